"""Writes the recipe reference from the schema: `python scripts/reference.py docs/recipes.md`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hfcompress.data.task import Splits
from hfcompress.data.tasks import TASKS
from hfcompress.distillation.augmentation.options import Augment
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.recovery import Recover
from hfcompress.distillation.stage import Distill
from hfcompress.distillation.student import Student
from hfcompress.distillation.teachers import Teachers
from hfcompress.finetuning.stage import Finetune
from hfcompress.measure.measure import Measure
from hfcompress.measure.timing import Latency
from hfcompress.pruning.budget import Budget
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.pruning.pattern import Pattern
from hfcompress.pruning.schedules import Gradual, Iterative, Lottery, OneShot
from hfcompress.pruning.stage import Prune, Sensitivity
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.quantization.stage import Quantize
from hfcompress.recipe.schema import Hub, Recipe
from hfcompress.training.lora import Lora
from hfcompress.training.loss import Ramp
from hfcompress.training.options import Train
from hfcompress.utils.registry import Component, Registry

HEAD = """# The recipe

Written by `make docs` from the schema. A recipe is a YAML mapping; unknown keys, wrong types and what cannot work are
all reported at once by `hfcompress check`, each with its line. `--set KEY.PATH=VALUE` overrides any value, list entries
counted from 0: `--set stages.0.train.epochs=1`.

A loss, criterion or backend is its name (`taylor`) or a mapping with options (`{use: taylor, rows: 512}`).
"""
PRUNING: list[type[BaseModel]] = [Prune, Budget, Pattern, OneShot, Iterative, Gradual, Lottery, Recover, Sensitivity]
BLOCKS: dict[str, list[type[BaseModel]]] = {
    "Top level": [Recipe],
    "`task`": [*TASKS, Splits],
    "`stages`": [Finetune, Distill, Student, Lora, Teachers, Augment, Ramp, *PRUNING, Quantize],
    "`train`": [Train],
    "`measure`": [Measure, Latency],
    "`hub`": [Hub],
}
DRAWERS: dict[str, Registry[Any]] = {"Losses": LOSSES, "Criteria": CRITERIA, "Backends": BACKENDS}


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, models in BLOCKS.items():
        parts.append(f"\n## {title}\n")
        parts += [_block(model) for model in models]
    for title, drawer in DRAWERS.items():
        parts.append(f"\n## {title}\n")
        parts += [_component(name, drawer.get(name)) for name in drawer.names()]
    return "\n".join(parts).rstrip() + "\n"


def _block(model: type[BaseModel]) -> str:
    skip = set(Train.model_fields) - {"epochs"} if model is Recover else set()
    also = "\nand the keys of `train`.\n" if model is Recover else ""
    return f"### {model.__name__}\n\n{_prose(model)}\n\n{_fields(model, skip)}{also}"


def _component(name: str, cls: type[Component]) -> str:
    needs = f" Needs `hfcompress[{cls.extra}]`." if cls.extra else ""
    fields = _fields(cls, set())
    return f"### `{name}`\n\n{_prose(cls)}{needs}\n\nSource: {cls.source}\n\n{fields}"


def _prose(model: type) -> str:
    return " ".join((model.__doc__ or "").split())


def _fields(model: type[BaseModel], skip: set[str]) -> str:
    rows = [_row(field.alias or name, field) for name, field in model.model_fields.items() if name not in skip]
    return "\n".join(["| key | type | default | what it says |", "|---|---|---|---|", *rows, ""]) if rows else ""


def _row(name: str, field: Any) -> str:
    text = " ".join((field.description or "").split())
    bounds = ", ".join(filter(None, map(_bound, field.metadata)))
    # Python's classes stand for what a recipe spells out: which kind of stage, type of task, or schedule.
    spelled = field.is_required() or (name in ("kind", "type", "use") and len(get_args(field.annotation)) == 1)
    default = "required" if spelled else _default(field)
    described = f"{text} ({bounds})" if bounds and text else text or bounds
    return f"| `{name}` | {_type(field.annotation)} | {default} | {described} |".replace("\n", " ")


def _bound(part: Any) -> str:
    words = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
    kind = type(part).__name__
    return f"{words[kind]} {getattr(part, kind.lower()):,}" if kind in words else ""


def _default(field: Any) -> str:
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


def _type(annotation: Any) -> str:
    if get_origin(annotation) is not None and str(get_origin(annotation)).endswith("Literal"):
        return " / ".join(f"`{value}`" for value in get_args(annotation))
    arguments = [part for part in get_args(annotation) if part is not type(None) and not _is_plumbing(part)]
    if str(get_origin(annotation)).endswith("Annotated'>"):
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"{len(arguments)} x {_type(arguments[0])}"
    if get_origin(annotation) is list:
        return "list of " + _type(arguments[0])
    if arguments:
        return " or ".join(dict.fromkeys(_type(part) for part in arguments))
    return str(getattr(annotation, "__name__", annotation))


def _is_plumbing(part: Any) -> bool:
    return not isinstance(part, type) and get_origin(part) is None and type(part).__module__.startswith("pydantic")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
