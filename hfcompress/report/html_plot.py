"""The trade-off plots of report.html: quality against size and latency, as points, labels and ticks in SVG units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hfcompress.data.metrics import LOWER_IS_BETTER
from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.tables import shorten_names
from hfcompress.utils.wording import significant

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 20, 46
"""The space around the axes."""
LETTER, LINE, MARKER, LONGEST, NEAR = 6.2, 13, 5, 22, 36
"""Width of a letter and height of a line of a label; half the width of a point; letters of a label, and its distance
from the point, at most."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge."""


@dataclass(frozen=True)
class Label:
    """The name beside a point."""

    text: str
    x: float
    y: float
    anchor: Literal["start", "middle", "end"]

    @property
    def box(self) -> Box:
        """The space that the name takes."""
        width = len(self.text) * LETTER
        left = self.x - {"start": 0.0, "middle": width / 2, "end": width}[self.anchor]
        return left, self.y - LINE + 3, left + width, self.y + 3


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
    rows = content["rows"]
    panels = [_draw_panel(content, "weights on disk", "MB", [row["disk_bytes"] / 1e6 for row in rows])]
    for number, entry in enumerate(rows[0]["latency"]):
        title = f"median latency at batch {entry['batch_size']}"
        times = [row["latency"][number]["p50_ms"] for row in rows]
        panels.append(Panel(title) if was_busy(content) else _draw_panel(content, title, "ms", times))
    return panels


def _draw_panel(content: Mapping[str, Any], title: str, unit: str, costs: Sequence[float]) -> Panel:
    rows, metric, names = content["rows"], find_metric(content), shorten_names(r["stage"] for r in content["rows"])
    known = [n for n, row in enumerate(rows) if costs[n] > 0 and math.isfinite(row["quality"][metric])]
    if not known:
        return Panel(title)
    quality = {n: rows[n]["quality"][metric] for n in known}
    ends = {n: [e if math.isfinite(e) else quality[n] for e in rows[n]["quality_interval"]] for n in known}
    y_values = [*quality.values(), *(end for pair in ends.values() for end in pair)]
    low, high = min(y_values), max(y_values)
    pad = 0.08 * (high - low) or 0.05
    x = _Scale(math.log(min(costs[n] for n in known)), math.log(max(costs[n] for n in known)), LEFT, WIDTH - RIGHT)
    y = _Scale(low - pad, high + pad, HEIGHT - BOTTOM, TOP, margin=0)
    points = []
    for n in known:
        kind: Literal["source", "model", "last"] = "source" if n == 0 else "last" if n == len(rows) - 1 else "model"
        lines = (
            names[n],
            f"{metric} {quality[n]:.4f} (95% interval {ends[n][0]:.4f} to {ends[n][1]:.4f})",
            f"{title}: {significant(costs[n])} {unit}",
        )
        points.append(Point(x(math.log(costs[n])), y(quality[n]), y(ends[n][0]), y(ends[n][1]), kind, lines))
    lower = any(row.get("against_source", {}).get("lower_is_better") for row in rows) or metric in LOWER_IS_BETTER
    return Panel(
        title,
        unit,
        x_ticks=[(x(math.log(value)), f"{value:g}") for value in _list_log_ticks([costs[n] for n in known])],
        y_ticks=[(y(value), text) for value, text in _list_ticks(low - pad, high + pad)],
        points=_place_labels(points, [names[n] for n in known]),
        front=_trace_front(points, lower),
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


def _list_log_ticks(values: Sequence[float]) -> list[float]:
    """Lists round values of a logarithmic axis, or the measured bounds if these are closer than that."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 4 else (1, 3) if last - first > 2 else (1, 2, 5)
    inside = [f * 10.0**n for n in range(first, last + 1) for f in factors if low / 1.2 <= f * 10.0**n <= high * 1.2]
    return inside if len(inside) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})


def _trace_front(points: Sequence[Point], lower_is_better: bool) -> str:
    """Traces the Pareto front: the models of which no other is both smaller (or faster) and better."""
    sign = -1 if lower_is_better else 1  # `y` is counted from the top: a high quality has a small `y`
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return " ".join(f"{point.x},{point.y}" for point in front)


def _place_labels(points: Sequence[Point], names: Sequence[str]) -> list[Point]:
    """Writes each name where it covers neither a point nor another name; a name without such a place is left out.

    The last model, which the report is about, comes first.
    """
    taken = [(p.x - MARKER, p.y - MARKER, p.x + MARKER, p.y + MARKER) for p in points]
    bars = [(p.x - 1, p.high, p.x + 1, p.low) for p in points]
    labels: dict[int, Label] = {}
    for n in dict.fromkeys([len(points) - 1, *range(len(points))]):
        text = names[n] if len(names[n]) <= LONGEST else f"{names[n][: LONGEST - 1]}…"
        free = [
            label
            for label in _list_places(points[n], text)
            if _is_inside(label.box) and not any(_overlap(label.box, other) for other in taken)
        ]
        if free:
            labels[n] = min(free, key=lambda label: sum(_overlap(label.box, bar) for bar in bars))
            taken.append(labels[n].box)
    return [replace(point, label=labels.get(n)) for n, point in enumerate(points)]


def _list_places(point: Point, text: str) -> Iterator[Label]:
    yield Label(text, point.x + 9, point.y + 4, "start")
    yield Label(text, point.x - 9, point.y + 4, "end")
    for above, below in ((-8, 16), (-22, 30)):
        for shift in (above, below):
            yield Label(text, point.x + 5, point.y + shift, "start")
            yield Label(text, point.x - 5, point.y + shift, "end")
    for end, shift in ((point.high, -6), (point.low, 14)):
        if abs(end - point.y) < NEAR:
            yield Label(text, point.x, end + shift, "middle")


def _is_inside(box: Box) -> bool:
    return box[0] >= LEFT + 2 and box[1] >= 2 and box[2] <= WIDTH - 2 and box[3] <= HEIGHT - BOTTOM - 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
