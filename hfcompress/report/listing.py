"""The tables of `hfcompress list`, `plan` and `doctor`: components, recipes, backends, planned shapes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError
from rich import box
from rich.table import Table

from hfcompress.data.metrics import OF_TASK
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.quantization.backends.base import BACKENDS, Backend
from hfcompress.recipe.loader import find_shipped, read_headline
from hfcompress.recipe.plan import PlannedRow, format_layers
from hfcompress.utils.registry import Component, ComponentError, Registry

C = TypeVar("C", bound=Component)
_REGISTRIES: dict[str, Registry[Any]] = {"losses": LOSSES, "criteria": CRITERIA, "backends": BACKENDS}
SECTIONS = ("recipes", *_REGISTRIES, "metrics")


def render_section(name: str) -> Table:
    """Renders one of `SECTIONS` as a table for the terminal."""
    if name == "recipes":
        rows = [[recipe, read_headline(path.read_text(encoding="utf-8"))] for recipe, path in find_shipped().items()]
        return _render_table("recipes", ["name", "what it makes"], rows)
    if name == "metrics":
        rows = [[task, ", ".join(names)] for task, names in OF_TASK.items()]
        return _render_table("metrics", ["task", "names"], rows)
    if name == "backends":
        head = ["name", "what it is", "device", "needs", "source", "options", "runs here"]
        return _render_table(name, head, _list_rows(BACKENDS, _describe_backend, len(head)))
    head = ["name", "what it is", "source", "options"]
    return _render_table(name, head, _list_rows(_REGISTRIES[name], _describe_component, len(head)))


def _list_rows(registry: Registry[C], describe: Callable[[type[C]], list[str]], width: int) -> list[list[str]]:
    """Lists a row for each component; a broken one of another package shows its error in the second cell."""
    rows = []
    for name in registry.names():
        try:
            rows.append(describe(registry.get(name)))
        except ComponentError as error:
            problem = error.problems[0]
            text = "; ".join(filter(None, [problem.message, problem.fix]))
            rows.append([name, f"broken: {text}", *["-"] * (width - 2)])
        except ValidationError:  # an option without a default: nothing can be said before it is set
            rows.append([name, "has options that a recipe must set", *["-"] * (width - 2)])
    return rows


def _describe_component(cls: type[Component]) -> list[str]:
    return [cls.name, _read_summary(cls), cls.source or "-", _list_options(cls)]


def _describe_backend(cls: type[Backend]) -> list[str]:
    name, summary, source, options = _describe_component(cls)
    return [name, summary, ", ".join(cls.runs_on), cls.extra or "-", source, options, _describe_availability(cls())]


def _describe_availability(backend: Backend) -> str:
    """Says whether a backend runs on this machine; if it does not, also why, and how to fix it."""
    problem = backend.unavailable()
    return f"no: {problem[0]}; {problem[1]}" if problem else "yes"


def _read_summary(cls: type[Component]) -> str:
    """Reads the first line of a component's documentation: its file's in hfcompress, its own in another package."""
    documented = [sys.modules[cls.__module__], cls]
    if not cls.__module__.startswith("hfcompress."):
        documented.reverse()
    texts = (inspect.cleandoc(thing.__doc__ or "") for thing in documented)
    return next((text.splitlines()[0] for text in texts if text), "-")


def _list_options(cls: type[Component]) -> str:
    return ", ".join(cls.model_fields) or "-"


def render_backends() -> Table:
    """Renders a table of the backends: whether each runs on this machine, and what is slow or inaccurate there."""
    from hfcompress.measure.hardware import abilities

    machine, head = abilities(), ["name", "runs here", "note"]

    def describe(cls: type[Backend]) -> list[str]:
        backend = cls()
        return [cls.name, _describe_availability(backend), "; ".join(backend.advice(machine)) or "-"]

    return _render_table("backends", head, _list_rows(BACKENDS, describe, len(head)))


def _render_table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for heading in head:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def render_plan(rows: list[PlannedRow], length: int) -> Table:
    """Renders a plan as a table for the terminal.

    Args:
        rows: The rows of the plan.
        length: The number of tokens that MACs are counted at.
    """
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
            *format_layers(shape),
            str(shape.hidden),
            f"{about}{shape.parameters:,}",
            f"{about}{shape.parameters / 1e6:.1f}M",
            f"{about}{shape.encoder_parameters:,}",
            f"{about}{shape.bytes / 1e6:.1f}",
            f"{about}{shape.macs(length) / 1e6:,.1f}M",
            "?" if row.steps is None else f"{row.steps:,}" if row.steps else "-",
        )
    return table
