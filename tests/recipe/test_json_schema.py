"""The JSON Schema that editors complete and check recipes by."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from hfcompress.recipe.json_schema import REGISTRIES, make_json_schema
from hfcompress.recipe.loader import find_shipped, parse, validate
from hfcompress.recipe.schema import Recipe
from hfcompress.recipe.yaml_text import parse_yaml
from hfcompress.utils.errors import HfcompressError
from tests.factories import run_cli

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "name": "r",
    "model": "m",
    "task": {"type": "text-classification", "dataset": "data", "text": ["sentence"]},
    "stages": [
        {"kind": "distill", "student": {"layers": 2}, "losses": ["soft_labels"]},
        {"kind": "prune", "criterion": "taylor", "heads": 0.5},
    ],
}


@cache
def _validator() -> Draft202012Validator:
    schema = make_json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def _changed(path: str, value: Any) -> dict[str, Any]:
    changed = deepcopy(RECIPE)
    *parents, last = path.split(".")
    place: Any = changed
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    return changed


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("schema") == 0
    assert json.loads(capsys.readouterr().out) == make_json_schema()


@pytest.mark.parametrize("path", [*find_shipped().values()], ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    _validator().validate(parse_yaml(path.read_text(encoding="utf-8"), path)[0])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 7),
        ("measure.margin", "1%"),
        ("measure.margin", 0.01),
        ("task.metric", {"evaluate": "accuracy", "key": "accuracy"}),
        ("stages.0.teacher", "source"),
        ("stages.0.teacher", ["source", "org/other"]),
        ("stages.0.teacher", {"models": ["source", "parent"], "combine": "confidence"}),
        ("stages.0.layer_map", "last"),
        ("stages.0.layer_map", [[1, 2], [2, 4]]),
        ("stages.0.losses", ["soft_labels", {"use": "hidden_states", "weight": 2}]),
        ("stages.0.losses", [{"use": "soft_labels", "weight": {"start": 0, "end": 1}}]),
        ("stages.0.losses", [{"use": "hard_labels", "class_weights": "balanced"}]),
        ("stages.0.losses", [{"use": "hard_labels", "class_weights": {"rare": 4}}]),
        ("stages.1.schedule", "iterative"),
        ("stages.1.schedule", {"use": "iterative", "rounds": 3}),
        ("stages.1.criterion", {"use": "taylor", "rows": 64}),
        ("stages.1.weights", {"n_of_m": [2, 4]}),
        ("stages.1.weights", {"share": 0.5, "block": [4, 1]}),
        ("hub.language", ["en", "de"]),
    ],
)
def test_short_forms_are_valid_in_the_schema_and_in_a_recipe(path: str, value: Any) -> None:
    recipe = _changed(path, value)
    _validator().validate(recipe)
    Recipe.model_validate(recipe)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sed", 7),
        ("seed", "7"),
        ("seed", -1),
        ("task.type", "classification"),
        ("measure.margin", "a bit"),
        ("measure.margin", 1),
        ("stages.0.kind", "distil"),
        ("stages.0.student.layer", 2),
        ("stages.0.teacher", {"models": "source"}),
        ("stages.0.layer_map", "middle"),
        ("stages.0.losses", ["soft_label"]),
        ("stages.0.losses", [{"use": "soft_labels", "temprature": 2}]),
        ("stages.0.losses", [{"temperature": 2}]),
        ("stages.0.losses", [{"use": "soft_labels", "weight": -1}]),
        ("stages.0.losses", [{"use": "hard_labels", "class_weights": {"rare": 0}}]),
        ("stages.0.train", {"epochs": "three"}),
        ("stages.1.schedule", "at_once"),
        ("stages.1.schedule", {"rounds": 3}),
        ("stages.1.criterion", "tailor"),
        ("stages.1.weights", {"n_of_m": [2]}),
        ("stages", [{"criterion": "taylor", "heads": 0.5}]),
        ("stages", []),
    ],
)
def test_mistakes_are_invalid_in_the_schema_and_in_a_recipe(path: str, value: Any) -> None:
    recipe = _changed(path, value)
    with pytest.raises(ValidationError):
        _validator().validate(recipe)
    with pytest.raises(HfcompressError):
        validate(parse(json.dumps(recipe), Path("r.yaml")))


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _parts(part)


def test_a_default_is_spelled_as_a_recipe_may_spell_it() -> None:
    schema = make_json_schema()
    found = [part for part in _parts(schema) if {"default"} < set(part) and "properties" not in part]
    assert len(found) > 100
    for part in found:
        Draft202012Validator({**part, "$defs": schema["$defs"]}).validate(part["default"])


def test_a_key_is_described_as_in_the_reference() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    definitions = make_json_schema()["$defs"]
    classes = [(model, definitions[model.__name__]) for model in reference.models_in(Recipe) if model is not Recipe]
    for registry in REGISTRIES:
        for choice in definitions[registry.base.__name__]["anyOf"][1:]:
            classes.append((registry.get(choice["properties"]["use"]["const"]), choice))
    assert len(classes) > 60
    for model, schema in [(Recipe, make_json_schema()), *classes]:
        assert set(schema["properties"]) - {"use"} == {
            field.alias or name for name, field in model.model_fields.items()
        } - {"use"}
        for name, field in model.model_fields.items():
            described = schema["properties"][field.alias or name].get("description", "")
            assert described.split() == (field.description or "").split()
