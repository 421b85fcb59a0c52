"""Tables of what there is and what is planned."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from hfcompress.data.metrics import OF_TASK
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.quantization.backends.base import BACKENDS, Backend
from hfcompress.recipe.loader import find_shipped, read_headline
from hfcompress.recipe.plan import PlannedRow, layers_text

if TYPE_CHECKING:
    from hfcompress.utils.registry import Component, Registry

_DRAWERS: dict[str, Registry] = {"losses": LOSSES, "criteria": CRITERIA, "backends": BACKENDS}  # type: ignore[type-arg]
SECTIONS = ("recipes", *_DRAWERS, "metrics")


def section(name: str) -> Table:
    """The table of one section."""
    if name == "recipes":
        rows = [[recipe, read_headline(path.read_text(encoding="utf-8"))] for recipe, path in find_shipped().items()]
        return _table("recipes", ["name", "what it makes"], rows)
    if name == "metrics":
        rows = [[task, ", ".join(names)] for task, names in OF_TASK.items()]
        return _table("metrics", ["task", "names"], rows)
    if name == "backends":
        head = ["name", "what it is", "device", "needs", "source", "options", "here"]
        return _table(name, head, [_backend(BACKENDS.get(backend)) for backend in BACKENDS.names()])
    return _table(name, ["name", "what it is", "source", "options"], _components(_DRAWERS[name]))


def _components(drawer: Registry) -> list[list[str]]:  # type: ignore[type-arg]
    found = [drawer.get(name) for name in drawer.names()]
    return [[cls().name, _what(cls), cls.source, _options(cls)] for cls in found]


def _backend(cls: type[Backend]) -> list[str]:
    return [cls().name, _what(cls), ", ".join(cls.runs_on), cls.extra or "-", cls.source, _options(cls), here(cls())]


def here(backend: Backend) -> str:
    """Whether a backend will run on this machine; if not, why, and the repair."""
    why = backend.unavailable()
    return f"no: {why[0]}; {why[1]}" if why else "yes"


def _what(cls: type[Component]) -> str:
    return str(sys.modules[cls.__module__].__doc__).splitlines()[0]


def _options(cls: type[Component]) -> str:
    return ", ".join(cls.model_fields) or "-"


def backends_table() -> Table:
    """What runs on this machine, and what to mind there."""
    from hfcompress.measure.hardware import abilities

    found = abilities()
    backends = [BACKENDS.get(name)() for name in BACKENDS.names()]
    rows = [[backend.name, here(backend), "; ".join(backend.advice(found)) or "-"] for backend in backends]
    return _table("backends", ["name", "here", "mind"], rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for heading in head:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plan_table(rows: list[PlannedRow], length: int) -> Table:
    """The plan, for the terminal."""
    head = [
        "stage",
        "layers",
        "heads",
        "FFN",
        "hidden",
        "parameters",
        "",
        "encoder",
        "MB",
        f"MACs at {length}",
        "steps",
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(head):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        shape = row.shape
        about = "~" if shape.estimated else ""
        table.add_row(
            row.stage,
            *layers_text(shape),
            str(shape.hidden),
            f"{about}{shape.parameters:,}",
            f"{about}{shape.parameters / 1e6:.1f}M",
            f"{about}{shape.encoder_parameters:,}",
            f"{about}{shape.bytes / 1e6:.1f}",
            f"{about}{shape.macs(length) / 1e6:,.1f}M",
            "?" if row.steps is None else f"{row.steps:,}" if row.steps else "-",
        )
    return table
