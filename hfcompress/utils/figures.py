"""Colours, panels and saving, for all figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.utils.files import new_file

if TYPE_CHECKING:
    from matplotlib import figure
    from matplotlib.axes import Axes

INK, ACCENT, BLUE, FAINT = "#1f2933", "#d55e00", "#0072b2", "#8a939d"
"""Ink, and colours of Okabe and Ito, which colour-blind readers can tell apart; grey for lines in the background."""
WIDTH, DPI, TITLE, SMALL = 6.4, 150, 10, 8
"""Inches of a figure, pixels of an inch, and points of its text: 600 pixels wide, small text is 10 pixels high."""


@dataclass(frozen=True)
class Figure:
    """A figure about one model, for the card and `plots/`.

    Attributes:
        name: The last part of its file's name: `kept` becomes `02-prune-kept.png`.
        title: The text above the figure, after the stage's name.
        caption: The sentence that the card shows below it.
        draw: Draws it with matplotlib; `save` adds the title and writes it to a file.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], figure.Figure]


def make_panels(count: int, width: float, height: float = 4.2, **options: Any) -> tuple[figure.Figure, list[Axes]]:
    """Makes a matplotlib figure with `count` panels side by side, each `width` x `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, count, squeeze=False, **options)[0])


def make_grid(count: int, height: float) -> tuple[figure.Figure, list[Axes]]:
    """Makes a matplotlib figure with `count` panels in two columns; the first of an odd number takes a whole row.

    Args:
        count: The number of panels.
        height: Inches of a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = [0, *range(count)] if count % 2 else list(range(count))
    rows = [cells[n : n + 2] for n in range(0, len(cells), 2)]
    made = Figure(figsize=(WIDTH, height * len(rows)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(made)
    axes: dict[int, Axes] = made.subplot_mosaic(rows)
    return made, [axes[n] for n in range(count)]


def add_title(drawn: figure.Figure, title: str) -> None:
    """Adds a title to a matplotlib figure, in lines that fit its width."""
    lines = wrap(title, int(drawn.get_figwidth() * 72 / (0.5 * TITLE)))
    drawn.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=TITLE, color=INK)


def settle(drawn: figure.Figure) -> None:
    """Lays a matplotlib figure out and keeps the layout, so that places in it can be asked for."""
    drawn.draw_without_rendering()
    drawn.set_layout_engine("none")


def write(drawn: figure.Figure, path: Path) -> None:
    """Writes a matplotlib figure as a PNG file, completely or not at all."""
    with new_file(path) as scratch:
        drawn.savefig(scratch, dpi=DPI, format="png")


def save(drawn: figure.Figure, title: str, path: Path) -> None:
    """Adds a title to a matplotlib figure and writes it as a PNG file."""
    add_title(drawn, title)
    write(drawn, path)


def tidy(axis: Axes, lines: Literal["x", "y"] = "y") -> None:
    """Draws faint grid lines for the values of one axis, and removes the frame's top and right side."""
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=SMALL)
    axis.xaxis.label.set_fontsize(SMALL + 1)
    axis.yaxis.label.set_fontsize(SMALL + 1)
    axis.grid(True, axis=lines, color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
