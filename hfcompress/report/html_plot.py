"""The trade-off plots of report.html: quality against size and latency, as points, labels and ticks in SVG units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hfcompress.report import tradeoff
from hfcompress.report.conditions import find_metric
from hfcompress.report.labels import Box, Mark, place_labels
from hfcompress.report.names import shorten_names
from hfcompress.utils.wording import significant

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 20, 46
"""The space around the axes."""
LETTER, LINE, DESCENT, LONGEST = 6.2, 13, 3, 22
"""Width of a letter, height of a line, how far it reaches below the letters' feet; letters of a label at most."""


@dataclass(frozen=True)
class Label:
    """The name beside a point; `y` is the baseline."""

    text: str
    x: float
    y: float
    anchor: Literal["start", "middle", "end"]
    box: Box


@dataclass(frozen=True)
class Point:
    """A model in a plot.

    Attributes:
        x, y: Its place.
        low, high: The places of the ends of the quality's 95% interval.
        kind: Decides colour and shape.
        lines: The figures that are shown while the pointer is on it.
        label: Its name; None if there is no space for it.
    """

    x: float
    y: float
    low: float
    high: float
    kind: Literal["source", "model", "last"]
    lines: tuple[str, ...]
    label: Label | None = None


@dataclass(frozen=True)
class Panel:
    """A plot: quality against one cost; `points` are empty if the machine was busy when it timed the models."""

    title: str
    unit: str = ""
    x_ticks: Sequence[tuple[float, str]] = ()
    y_ticks: Sequence[tuple[float, str]] = ()
    points: Sequence[Point] = ()
    front: str = ""


def draw_panels(content: Mapping[str, Any]) -> list[Panel]:
    """Draws quality against the size, and against the latency at each batch size."""
    metric = find_metric(content)
    return [_draw_panel(panel, metric) for panel in tradeoff.list_panels(content)]


def _draw_panel(panel: tradeoff.Panel, metric: str) -> Panel:
    models = panel.models
    if not models:
        return Panel(panel.title)
    low, high = min(m.low for m in models), max(m.high for m in models)
    pad = 0.08 * (high - low) or 0.05
    costs = [model.cost for model in models]
    x = _Scale(math.log(min(costs)), math.log(max(costs)), LEFT, WIDTH - RIGHT)
    y = _Scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP, margin=0)
    points = [
        Point(
            x(math.log(m.cost)), y(m.quality), y(m.low), y(m.high), m.kind,
            lines=(
                m.name,
                f"{metric} {m.quality:.4f} (95% interval {m.low:.4f} to {m.high:.4f})",
                f"{panel.title}: {significant(m.cost)} {panel.unit}",
            ),
        )
        for m in models
    ]  # fmt: skip
    return Panel(
        panel.title,
        panel.unit,
        x_ticks=[(x(math.log(value)), f"{value:g}") for value in tradeoff.list_log_ticks(costs)],
        y_ticks=[(y(value), text) for value, text in _list_ticks(low - pad, high + pad)],
        points=_add_labels(points, [model.name for model in models], panel.front),
        front=" ".join(f"{points[n].x},{points[n].y}" for n in panel.front),
    )


class _Scale:
    """Maps values to places, with a margin on both sides for points and labels."""

    def __init__(self, low: float, high: float, start: float, end: float, margin: float = 0.1) -> None:
        spread = (high - low) or 1.0
        self._low, self._spread = low - margin * spread - (0.5 if high == low else 0), spread * (1 + 2 * margin)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return round(self._start + (value - self._low) / self._spread * (self._end - self._start), 1)


def _list_ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Lists round values between two bounds, and how they are written: all with as many decimals."""
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(f * power for f in (0.1, 0.2, 0.5, 1, 2, 5) if (high - low) / (f * power) <= most)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    values = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.{decimals}f}") for value in values]


def _add_labels(points: Sequence[Point], names: Sequence[str], front: Sequence[int]) -> list[Point]:
    """Writes each name where it covers neither a point nor another name; a name without such a place is left out."""
    texts = shorten_names(names, LONGEST)
    marks = [Mark(p.x, p.y, p.low, p.high, len(t) * LETTER, LINE) for p, t in zip(points, texts, strict=True)]
    labelled = []
    for point, text, place in zip(
        points, texts, place_labels(marks, (LEFT + 2, 2, WIDTH - 2, HEIGHT - BOTTOM - 2)), strict=True
    ):
        if place is not None:
            left, _, right, bottom = place.box
            x = {"start": left, "middle": (left + right) / 2, "end": right}[place.anchor]
            point = replace(point, label=Label(text, round(x, 1), round(bottom - DESCENT, 1), place.anchor, place.box))
        labelled.append(point)
    return labelled
