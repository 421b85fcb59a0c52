"""Places of labels beside points, so that no label covers a point or another label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import hypot
from typing import Literal

MARKER, NEAR = 5, 36
"""Half the width of a point, and the distance of a label from its point at most."""
Anchor = Literal["start", "middle", "end"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge; `y` counts from the top."""


@dataclass(frozen=True)
class Mark:
    """A point to label.

    Attributes:
        x, y: Its place.
        low, high: The places of the ends of its vertical bar.
        width, height: The size of its label.
    """

    x: float
    y: float
    low: float
    high: float
    width: float
    height: float


@dataclass(frozen=True)
class Place:
    """The place of a label: its box, and the edge of the box that is nearest to the point."""

    box: Box
    anchor: Anchor


def place_labels(marks: Sequence[Mark], area: Box, line: Sequence[int] = ()) -> list[Place | None]:
    """Finds a place inside the area for each label; a label that covers something wherever it stands gets None.

    The last model, which the report is about, comes first. A label covers a bar or the line only if it must.

    Args:
        marks: The points.
        area: Where labels may stand.
        line: The points that a line joins, as places in `marks`.
    """
    points = [(m.x - MARKER, m.y - MARKER, m.x + MARKER, m.y + MARKER) for m in marks]
    lines = [(m.x - 1, m.high, m.x + 1, m.low) for m in marks] + list(_list_dots([marks[n] for n in line]))
    taken, found = list(points), dict[int, Place]()
    order = range(len(marks))
    for n in dict.fromkeys([*order[-1:], *order]):
        free = [
            place
            for place in _list_places(marks[n])
            if _is_inside(place.box, area) and not any(_overlap(place.box, other) for other in taken)
        ]
        if free:
            found[n] = min(free, key=lambda place: sum(_overlap(place.box, each) for each in lines))
            taken.append(found[n].box)
    return [found.get(n) for n in range(len(marks))]


def _list_dots(marks: Sequence[Mark], step: float = 8) -> Iterator[Box]:
    """Lists dots on the line that joins some points."""
    for one, other in pairwise(marks):
        count = max(1, round(hypot(other.x - one.x, other.y - one.y) / step))
        for n in range(count):
            x, y = (a + (b - a) * n / count for a, b in ((one.x, other.x), (one.y, other.y)))
            yield x - 1, y - 1, x + 1, y + 1


def _list_places(mark: Mark) -> Iterator[Place]:
    """Lists the places beside, above and below a point, the best first."""
    yield _make_place(mark, mark.x + 9, mark.y, "start")
    yield _make_place(mark, mark.x - 9, mark.y, "end")
    for shift in (12, 26):
        for y in (mark.y - shift, mark.y + shift):
            yield _make_place(mark, mark.x + 5, y, "start")
            yield _make_place(mark, mark.x - 5, y, "end")
    for end, shift in ((mark.high, -10), (mark.low, 10)):
        if abs(end - mark.y) < NEAR:
            yield _make_place(mark, mark.x, end + shift, "middle")


def _make_place(mark: Mark, x: float, middle: float, anchor: Anchor) -> Place:
    left = x - {"start": 0.0, "middle": mark.width / 2, "end": mark.width}[anchor]
    return Place((left, middle - mark.height / 2, left + mark.width, middle + mark.height / 2), anchor)


def _is_inside(box: Box, area: Box) -> bool:
    return box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
