"""Quality against size and latency: the panels that the page and the picture draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfcompress.data.metrics import LOWER_IS_BETTER
from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.names import list_names


@dataclass(frozen=True)
class Model:
    """A model in a panel.

    Attributes:
        name: Its short name.
        cost: Its size or latency, in the panel's unit.
        quality: Its score.
        low, high: The 95% interval of the score.
        kind: Decides colour and shape.
    """

    name: str
    cost: float
    quality: float
    low: float
    high: float
    kind: Literal["source", "model", "last"]


@dataclass(frozen=True)
class Panel:
    """Quality against one cost.

    Attributes:
        title: The cost.
        unit: Its unit.
        models: Those whose cost and quality are known; none if the machine was busy when it timed the models.
        front: The Pareto front, as places in `models` by rising cost: no other model is both cheaper and better.
    """

    title: str
    unit: str
    models: Sequence[Model] = ()
    front: Sequence[int] = ()


def list_panels(content: Mapping[str, Any]) -> list[Panel]:
    """Lists a panel for the size, and one for the latency at each batch size."""
    rows, busy = content["rows"], was_busy(content)
    panels = [_make_panel(content, "weights on disk", "MB", [row["disk_bytes"] / 1e6 for row in rows])]
    for number, entry in enumerate(rows[0]["latency"]):
        title = f"median latency at batch {entry['batch_size']}"
        times = [row["latency"][number]["p50_ms"] for row in rows]
        panels.append(Panel(title, "ms") if busy else _make_panel(content, title, "ms", times))
    return panels


def _make_panel(content: Mapping[str, Any], title: str, unit: str, costs: Sequence[float]) -> Panel:
    rows, metric = content["rows"], find_metric(content)
    models = []
    for n, (name, row, cost) in enumerate(zip(list_names(content), rows, costs, strict=True)):
        quality = row["quality"][metric]
        if cost > 0 and math.isfinite(quality):
            low, high = (end if math.isfinite(end) else quality for end in row["quality_interval"])
            kind: Literal["source", "model", "last"] = "source" if n == 0 else "last" if n == len(rows) - 1 else "model"
            models.append(Model(name, cost, quality, low, high, kind))
    lower = any(row.get("against_source", {}).get("lower_is_better") for row in rows) or metric in LOWER_IS_BETTER
    return Panel(title, unit, models, _find_front(models, lower))


def _find_front(models: Sequence[Model], lower_is_better: bool) -> list[int]:
    """Finds the models of which no other is both cheaper and better."""
    sign = 1 if lower_is_better else -1
    front: list[int] = []
    for n in sorted(range(len(models)), key=lambda n: (models[n].cost, sign * models[n].quality)):
        if not front or sign * models[n].quality < sign * models[front[-1]].quality:
            front.append(n)
    return front


def list_log_ticks(values: Sequence[float]) -> list[float]:
    """Lists round values of a logarithmic axis, or the measured bounds if these are closer than that."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 4 else (1, 3) if last - first > 2 else (1, 2, 5)
    inside = [f * 10.0**n for n in range(first, last + 1) for f in factors if low / 1.2 <= f * 10.0**n <= high * 1.2]
    return inside if len(inside) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})
