"""Writes the recipe reference from the schema: `python scripts/reference.py docs/recipes.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.teachers import Teachers
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.recipe.schema import Recipe
from hfcompress.utils.registry import Component, Registry

HEAD = """# The recipe

Written by `make docs` from the schema. A recipe is a YAML mapping; unknown keys, wrong types and what cannot work are
all reported at once by `hfcompress check`, each with its line. `--set KEY.PATH=VALUE` overrides any value, list entries
counted from 0: `--set stages.0.train.epochs=1`.

A loss, criterion or backend is its name (`taylor`) or a mapping with options (`{use: taylor, rows: 512}`).
"""
REGISTRIES: dict[str, Registry[Any]] = {"Losses": LOSSES, "Criteria": CRITERIA, "Backends": BACKENDS}


def write_reference() -> str:
    """Writes the page: every class of options that a recipe can reach, then every component."""
    parts, shown = [HEAD, "\n## Top level\n", _write_block(Recipe, [])], list[type[BaseModel]]([Recipe])
    for name, field in Recipe.model_fields.items():
        found = [model for model in models_in(field.annotation) if model not in shown]
        if found:
            parts.append(f"\n## `{name}`\n")
        for model in found:
            shown.append(model)
            parts.append(_write_block(model, shown))
    components = [registry.get(name) for registry in REGISTRIES.values() for name in registry.names()]
    shared = [model for component in components for model in _find_options(component) if model not in shown]
    if shared:
        parts.append("\n## Options of several components\n")
        parts += [_write_block(model, []) for model in dict.fromkeys(shared)]
    for title, registry in REGISTRIES.items():
        parts.append(f"\n## {title}\n")
        parts += [_write_component(name, registry.get(name)) for name in registry.names()]
    return "\n".join(parts).rstrip() + "\n"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Finds the classes of options in a type, and in the types of their keys, each once; components are left out."""
    found: dict[type[BaseModel], None] = {}

    def walk(part: Any) -> None:
        options = isinstance(part, type) and issubclass(part, BaseModel) and not issubclass(part, Component)
        if options and part not in found:
            found[part] = None
            for field in part.model_fields.values():
                walk(field.annotation)
        for argument in get_args(part):
            walk(argument)

    walk(annotation)
    yield from found


def _find_options(component: type[Component]) -> Iterator[type[BaseModel]]:
    for field in component.model_fields.values():
        yield from models_in(field.annotation)


def _write_block(model: type[BaseModel], shown: list[type[BaseModel]]) -> str:
    """Writes a class; keys that it inherits from a class shown elsewhere are left out."""
    bases = [base for base in model.__mro__[1:] if base in shown and issubclass(base, BaseModel)]
    own = {name for name in model.model_fields if not any(_is_same_key(model, base, name) for base in bases)}
    also = f"\nand the keys of {' and '.join(f'`{base.__name__}`' for base in bases)}.\n" if bases else ""
    return (
        f"### {model.__name__}\n\n{_read_prose(model)}\n\n{_write_fields(model, set(model.model_fields) - own)}{also}"
    )


def _is_same_key(model: type[BaseModel], base: type[BaseModel], name: str) -> bool:
    """True if the key means the same in both classes."""
    if name not in base.model_fields:
        return False
    one, other = model.model_fields[name], base.model_fields[name]
    return _format_row(name, one) == _format_row(name, other)


def _write_component(name: str, cls: type[Component]) -> str:
    needs = f" Needs `hfcompress[{cls.extra}]`." if cls.extra else ""
    fields = _write_fields(cls, set())
    return f"### `{name}`\n\n{_read_prose(cls)}{needs}\n\nSource: {cls.source}\n\n{fields}"


def _read_prose(model: type) -> str:
    return " ".join((model.__doc__ or "").split())


def _write_fields(model: type[BaseModel], skip: set[str]) -> str:
    rows = [_format_row(field.alias or name, field) for name, field in model.model_fields.items() if name not in skip]
    return "\n".join(["| key | type | default | what it says |", "|---|---|---|---|", *rows, ""]) if rows else ""


def _format_row(name: str, field: Any) -> str:
    text = " ".join((field.description or "").split())
    bounds = ", ".join(filter(None, map(_format_bound, field.metadata)))
    # Python's classes stand for what a recipe spells out: which kind of stage, type of task, or schedule.
    spelled = field.is_required() or (name in ("kind", "type", "use") and len(get_args(field.annotation)) == 1)
    default = "required" if spelled else _format_default(field)
    described = f"{text} ({bounds})" if bounds and text else text or bounds
    return f"| `{name}` | {_format_type(field.annotation)} | {default} | {described} |".replace("\n", " ")


def _format_bound(part: Any) -> str:
    words = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
    kind = type(part).__name__
    return f"{words[kind]} {getattr(part, kind.lower()):,}" if kind in words else ""


def _format_default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, Component):
        return f"`{value.name}`"
    if isinstance(value, list) and value and isinstance(value[0], Component):
        return f"`[{', '.join(entry.name for entry in value)}]`"
    if isinstance(value, Teachers):
        return f"`{value.models[0]}`"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{str(value).lower() if isinstance(value, bool) else 'null' if value is None else value}`"


def _format_type(annotation: Any) -> str:
    if get_origin(annotation) is not None and str(get_origin(annotation)).endswith("Literal"):
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    arguments = [part for part in get_args(annotation) if part is not type(None) and not _is_plumbing(part)]
    if str(get_origin(annotation)).endswith("Annotated'>"):
        return _format_type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"{len(arguments)} x {_format_type(arguments[0])}"
    if get_origin(annotation) is list:
        return "list of " + _format_type(arguments[0])
    if arguments:
        return " or ".join(dict.fromkeys(_format_type(part) for part in arguments))
    return str(getattr(annotation, "__name__", annotation))


def _is_plumbing(part: Any) -> bool:
    return not isinstance(part, type) and get_origin(part) is None and type(part).__module__.startswith("pydantic")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(write_reference(), encoding="utf-8")
