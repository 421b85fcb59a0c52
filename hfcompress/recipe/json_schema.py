"""The JSON Schema of a recipe, which editors complete and check recipes by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hfcompress.distillation.losses.base import LOSSES
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.recipe.schema import Recipe
from hfcompress.utils.registry import Component, Registry

REGISTRIES: tuple[Registry[Any], ...] = (LOSSES, CRITERIA, BACKENDS)
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_json_schema() -> dict[str, Any]:
    """Makes the schema of recipe files: every key with its type, bounds and description, every component by name."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema["$defs"]
    for registry in REGISTRIES:
        base, components = registry.base.__name__, [registry.get(name) for name in registry.names()]
        choices = [_describe(component, definitions) for component in components]
        names = {"enum": [component.name for component in components]}
        definitions[base] = {"description": definitions[base].get("description", ""), "anyOf": [names, *choices]}
    return {"$schema": DIALECT, **schema}


def _describe(component: type[Component], definitions: dict[str, Any]) -> dict[str, Any]:
    """The mapping `{use: NAME, option: value}` of one component; the classes of its options join the definitions."""
    found = component.model_json_schema(by_alias=True)
    for name, definition in found.pop("$defs", {}).items():
        definitions.setdefault(name, definition)
    properties = {"use": {"const": component.name}, **found.get("properties", {})}
    return {**found, "properties": properties, "required": ["use", *found.get("required", [])]}


def list_references(schema: Any) -> Iterator[str]:
    """Lists the definitions that a schema refers to."""
    if isinstance(schema, dict):
        yield from (value for key, value in schema.items() if key == "$ref")
        for value in schema.values():
            yield from list_references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from list_references(value)
