"""Where a student's first weights come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hfcompress.base.shape import Shape, shape_of
from hfcompress.model.family import family_of
from hfcompress.model.observe import observe
from hfcompress.model.student import build_student
from hfcompress.model.surgery import Keep, cut
from hfcompress.stages.distill import uniform_map
from tests import world

FAMILIES = ("bert", "distilbert", "roberta")
PROJECTIONS = ("query", "key", "value")


def shape(model: Any) -> Shape:
    return shape_of(model.config.to_dict())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model.eval(), world.batch()).logits


def layer(model: Any, index: int) -> dict[str, torch.Tensor]:
    return family_of(model).stack(model)[index].state_dict()


def outside_layers(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".layer." not in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_copied_are_the_same_model(family: str) -> None:
    teacher = world.model(family, layers=3, seed=1)
    student, report = build_student(teacher, shape(teacher), [0, 1, 2])
    assert student.training
    assert torch.equal(logits(student), logits(teacher))
    assert report == {
        "embeddings": "copied",
        "head": "copied",
        **{f"layer {i}": f"copied from layer {i}" for i in (1, 2, 3)},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_student_copies_exactly_the_mapped_layers(family: str) -> None:
    teacher = world.model(family, layers=6, seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, report = build_student(teacher, replace(shape(teacher), layers=shape(teacher).layers[:3]), [1, 3, 5])
    assert [equal(layer(student, m), layer(teacher, g)) for m, g in enumerate((1, 3, 5))] == [True] * 3
    assert equal(outside_layers(student), outside_layers(teacher))
    assert [report[f"layer {i}"] for i in (1, 2, 3)] == [f"copied from layer {i}" for i in (2, 4, 6)]
    assert equal(teacher.state_dict(), before)


def test_a_student_owns_its_weights() -> None:
    teacher = world.model()
    student, _ = build_student(teacher, shape(teacher), [0, 1])
    expected = logits(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(logits(teacher), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("hidden", "heads", "ffn"), [(16, 4, 32), (24, 3, 48), (16, 2, 48)])
def test_a_narrower_student_keeps_the_first_dimensions_of_each_head(
    family: str, hidden: int, heads: int, ffn: int
) -> None:
    teacher = world.model(family, layers=2, hidden=32, heads=4, ffn=64, seed=1)
    small = replace(shape(teacher), hidden=hidden, head_dim=hidden // heads).with_layers(1, heads, ffn)
    student, report = build_student(teacher, small, [1])
    names, ours, theirs, width = family_of(teacher), layer(student, 0), layer(teacher, 1), hidden // heads
    for head in range(heads):
        for dim in range(width):
            new, old = head * width + dim, head * 8 + dim
            for part in PROJECTIONS:
                path = getattr(names, part)
                assert torch.equal(ours[f"{path}.weight"][new], theirs[f"{path}.weight"][old, :hidden])
                assert ours[f"{path}.bias"][new] == theirs[f"{path}.bias"][old]
            mixed = f"{names.attention_output}.weight"
            assert torch.equal(ours[mixed][:, new], theirs[mixed][:hidden, old])
    assert torch.equal(ours[f"{names.attention_output}.bias"], theirs[f"{names.attention_output}.bias"][:hidden])
    assert torch.equal(ours[f"{names.ffn_in}.weight"], theirs[f"{names.ffn_in}.weight"][:ffn, :hidden])
    assert torch.equal(ours[f"{names.ffn_out}.weight"], theirs[f"{names.ffn_out}.weight"][:hidden, :ffn])
    embedded = student.base_model.embeddings.word_embeddings.weight
    assert torch.equal(embedded, teacher.base_model.embeddings.word_embeddings.weight[:, :hidden])
    assert report["embeddings"] == "truncated"
    assert report["layer 1"] == "truncated from layer 2"
    assert bool(logits(student).isfinite().all())


def test_a_narrower_ffn_alone_leaves_the_rest_copied() -> None:
    teacher = world.model(layers=1)
    student, report = build_student(teacher, shape(teacher).with_layers(1, 4, 16), [0])
    ours, theirs = layer(student, 0), layer(teacher, 0)
    whole = [name for name in ours if not name.startswith(("intermediate", "output.dense.weight"))]
    assert all(torch.equal(ours[name], theirs[name]) for name in whole)
    assert report == {
        "embeddings": "copied", "layer 1": "copied and truncated from layer 1", "head": "copied"
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_position_table_keeps_its_first_rows(family: str) -> None:
    teacher = world.model(family)
    student, report = build_student(teacher, replace(shape(teacher), positions=20), [0, 1])
    table = student.base_model.embeddings.position_embeddings.weight
    assert torch.equal(table, teacher.base_model.embeddings.position_embeddings.weight[:20])
    assert student.config.max_position_embeddings == 20
    assert torch.allclose(logits(student), logits(teacher), atol=1e-6)
    assert report["embeddings"] == "copied and truncated"


def test_a_student_of_other_heads_but_equal_width_says_so() -> None:
    teacher = world.model(layers=1)
    student, report = build_student(teacher, replace(shape(teacher), head_dim=4).with_layers(1, 8, 64), [0])
    assert report == {
        "embeddings": "copied", "layer 1": "copied and regrouped into other heads from layer 1", "head": "copied"
    }  # fmt: skip
    assert equal(layer(student, 0), layer(teacher, 0))
    assert not torch.allclose(logits(student), logits(teacher), atol=1e-4)


def test_what_is_wider_than_its_origin_starts_at_random_and_says_so() -> None:
    teacher = world.model(layers=1)
    student, report = build_student(teacher, shape(teacher).with_layers(1, 4, 128), [0])
    assert report["layer 1"] == "copied and random from layer 1"
    assert torch.equal(
        layer(student, 0)["attention.self.query.weight"], layer(teacher, 0)["attention.self.query.weight"]
    )
    wide = replace(shape(teacher), hidden=64, head_dim=16)
    assert build_student(teacher, wide, [0])[1]["embeddings"] == "random"


def test_a_random_student_shares_nothing_and_follows_the_seed() -> None:
    teacher = world.model()

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        student, report = build_student(teacher, shape(teacher), [0, 1], random=True)
        assert report == {"all": "random"}
        return student

    assert equal(drawn(0).state_dict(), drawn(0).state_dict())
    words = [m.bert.embeddings.word_embeddings.weight for m in (drawn(0), drawn(1), teacher)]
    assert not torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_can_come_from_an_uneven_model(family: str) -> None:
    origin = cut(world.model(family, layers=2), [Keep((1,), tuple(range(32))), Keep((0, 1, 2, 3), tuple(range(48)))])
    student, _ = build_student(origin, shape(origin).with_layers(1, 4, 48), [1])
    assert not type(student).__name__.startswith("Pruned")
    assert equal(layer(student, 0), layer(origin, 1))
    other = build_student(origin, shape(origin).with_layers(1, 4, 32), [0])[1]
    assert other["layer 1"] == "copied and random from layer 1"


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, [3, 6, 9, 12]),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (3, 6, [2, 4, 6]),
        (4, 6, [2, 3, 5, 6]),
        (5, 12, [2, 5, 7, 10, 12]),
        (1, 12, [12]),
        (2, 2, [1, 2]),
    ],
)
def test_the_uniform_map(student: int, teacher: int, expected: list[int]) -> None:
    assert uniform_map(student, teacher) == expected


@pytest.mark.parametrize("teacher", range(1, 13))
def test_the_uniform_map_rises_and_ends_at_the_last_layer(teacher: int) -> None:
    for student in range(1, 15):
        layers = uniform_map(student, teacher)
        assert len(layers) == student
        assert layers == sorted(layers)
        assert 1 <= layers[0] <= layers[-1] == teacher
        assert all(abs(g - m * teacher / student) <= 0.5 or g == 1 for m, g in enumerate(layers, start=1))
        assert student > teacher or len(set(layers)) == student
