"""The JSON Schema of recipe files, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from hfcompress.distillation.losses.base import LOSSES
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.recipe.schema import Recipe
from hfcompress.utils.margin import Margin, spell_margin
from hfcompress.utils.registry import Component, Registry

FILE = "recipe.schema.json"
"""The usual name of the schema's file, beside the recipes."""
MODELINE = f"# yaml-language-server: $schema={FILE}"
"""The first line of a recipe that is checked by that file."""
REGISTRIES: tuple[Registry[Any], ...] = (LOSSES, CRITERIA, BACKENDS)
TAGS = ("kind", "type", "use")
"""Keys that say which of several classes a mapping is; a recipe has to spell them."""


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, with defaults as a recipe spells them: a component is its name, a margin `1%`."""

    def encode_default(self, dft: Any) -> Any:
        return super().encode_default(_spell(dft))


def make_json_schema() -> dict[str, Any]:
    """Makes the schema of recipe files: every key with its type, bounds and description, every component by name."""
    schema = Recipe.model_json_schema(by_alias=True, schema_generator=_Generator)
    definitions: dict[str, Any] = schema["$defs"]
    for registry in REGISTRIES:
        components = [_describe(registry.get(name), definitions) for name in registry.names()]
        # A component with required options has no short form.
        names = [found["properties"]["use"]["const"] for found in components if found["required"] == ["use"]]
        definitions[registry.base.__name__] = {
            "description": f"The name of a {registry.what}, or a mapping with `use: NAME` and options.",
            "anyOf": [{"enum": names}, *components],
        }
    some = {"required": ["stages"], "properties": {"stages": {"minItems": 1}}}
    schema["anyOf"] = [some, {"required": ["search"]}]
    finished: dict[str, Any] = _finish({"$schema": GenerateJsonSchema.schema_dialect, **schema})
    return finished


def _describe(component: type[Component], definitions: dict[str, Any]) -> dict[str, Any]:
    """The mapping `{use: NAME, option: value}` of one component; the classes of its options join the definitions."""
    found = component.model_json_schema(by_alias=True, schema_generator=_Generator)
    for name, definition in found.pop("$defs", {}).items():
        definitions.setdefault(name, definition)
    properties = {"use": {"const": component.name}, **found.get("properties", {})}
    return {**found, "properties": properties, "required": ["use", *found.get("required", [])]}


def _spell(value: Any) -> Any:
    if isinstance(value, list):
        return [_spell(entry) for entry in value]
    if isinstance(value, Margin):
        return spell_margin(value)
    return value.name if isinstance(value, Component) else value


def _finish(schema: Any) -> Any:
    """Unwraps the lines of descriptions, and requires the keys of `TAGS`."""
    if isinstance(schema, list):
        return [_finish(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _finish(part) for key, part in schema.items()}
    if isinstance(text := schema.get("description"), str):
        schema["description"] = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
    properties = schema.get("properties", {})
    tags = [key for key in TAGS if "const" in properties.get(key, {})]
    if tags:
        schema["required"] = list(dict.fromkeys([*tags, *schema.get("required", [])]))
    return schema
