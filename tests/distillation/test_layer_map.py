"""Which teacher layer teaches which student layer."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from hfcompress.distillation.layer_map import LayerMap, layer_map_problems, pairs_of, uniform_map
from hfcompress.recipe.loader import load
from hfcompress.utils.errors import HfcompressError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", ((1, 3), (2, 6), (3, 9), (4, 12))),
        ("dynamic", ((1, 3), (2, 6), (3, 9), (4, 12))),
        ("last", ((4, 12),)),
        ("top", ((1, 9), (2, 10), (3, 11), (4, 12))),
        ("bottom", ((1, 1), (2, 2), (3, 3), (4, 4))),
    ],
)
def test_named_maps_of_four_layers_on_twelve(name: str, expected: object) -> None:
    assert pairs_of(name, 4, 12) == expected


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (5, 12, [2, 5, 7, 10, 12]),
        (4, 6, [2, 3, 5, 6]),
        (3, 4, [1, 3, 4]),
        (1, 12, [12]),
        (2, 2, [1, 2]),
    ],
)
def test_the_uniform_map(student: int, teacher: int, expected: list[int]) -> None:
    assert uniform_map(student, teacher) == expected


def test_the_uniform_map_rises_evenly_and_ends_at_the_last_layer() -> None:
    for student, teacher in product(range(1, 25), range(1, 25)):
        layers = uniform_map(student, teacher)
        assert len(layers) == student
        assert layers == sorted(layers)
        assert 1 <= layers[0] <= layers[-1] == teacher
        assert all(abs(g - m * teacher / student) <= 0.5 or g == 1 for m, g in enumerate(layers, start=1))
        assert student > teacher or len(set(layers)) == student


def test_explicit_pairs_stay_as_they_are() -> None:
    assert pairs_of([[1, 2], [2, 7]], 2, 12) == ((1, 2), (2, 7))


def test_a_pair_outside_a_model_is_told_with_its_place() -> None:
    first, second = layer_map_problems([[1, 2], [3, 13]], 2, 12)
    assert "the student has 2 layers, so there is no layer 3" in first.message
    assert first.key == ("layer_map", 1, 0)
    assert "the teacher has 12 layers, so there is no layer 13" in second.message
    assert second.key == ("layer_map", 1, 1)


@pytest.mark.parametrize("name", ["uniform", "top", "bottom", "dynamic"])
def test_a_student_that_is_deeper_needs_another_map(name: str) -> None:
    assert "4 layers and the teacher 2" in layer_map_problems(name, 4, 2)[0].message
    assert layer_map_problems("last", 4, 2) == []
    assert layer_map_problems(name, 2, 4) == []


@pytest.mark.parametrize("bad", ["middle", [[1]], [[0, 1]], [], [[1, 2, 3]]])
def test_what_is_no_layer_map(bad: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(LayerMap).validate_python(bad)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("layer_map=unifrom", "there is no layer map 'unifrom'; did you mean 'uniform'?"),
        ("layer_map=3", "a layer map is a name (uniform, last, top, bottom, dynamic) or a list of"),
        ("layer_map=[[1, 0]]", "stages.0.layer_map.0.1"),
        ("losses=[{use: soft_labels, weight: -1}]", "a weight is a number of 0 or more"),
        ("losses=[{use: soft_labels, weight: {start: 1}}]", "stages.0.losses.0.weight.end"),
    ],
)
def test_what_is_wrong_with_one_of_two_forms_is_told_once(recipe: Path, override: str, told: str) -> None:
    with pytest.raises(HfcompressError) as error:
        load(recipe, [f"stages.0.{override}"])
    assert len(error.value.problems) == 1
    assert told in str(error.value)
