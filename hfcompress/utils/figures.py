"""Colours, panels and saving, for all figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.utils.files import new_file

if TYPE_CHECKING:
    from matplotlib import figure
    from matplotlib.axes import Axes

INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"


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


def save(drawn: figure.Figure, title: str, path: Path) -> None:
    """Adds a title to a matplotlib figure and writes it as a PNG file, completely or not at all."""
    drawn.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    with new_file(path) as scratch:
        drawn.savefig(scratch, dpi=150, format="png")


def tidy(axis: Axes, lines: Literal["x", "y"] = "y") -> None:
    """Draws faint grid lines for the values of one axis, and removes the frame's top and right side."""
    axis.set_axisbelow(True)
    axis.grid(True, axis=lines, color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
