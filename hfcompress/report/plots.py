"""Quality against size and against latency, every stage, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.utils.files import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, FAINT = "#1f2933", "#c2410c", "#9aa5b1"


def sheet(panels: int, width: float, height: float = 4.2, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels side by side, each so wide and high, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def written(figure: Figure, title: str, path: Path) -> None:
    """Titles the figure and writes it as a PNG, beside its place, then renamed there."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    with new_file(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")


def tidy(axis: Axes, lines: Literal["x", "y"] = "y") -> None:
    """Faint lines behind the values of one axis, and no frame on the sides that say nothing."""
    axis.set_axisbelow(True)
    axis.grid(True, axis=lines, color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def tradeoff(content: Mapping[str, Any], path: Path) -> None:
    """Draws one panel for size and one for each batch size's latency, all with the same quality axis.

    Times of a busy machine are not drawn: their ratios, which a picture shows, mean nothing.
    """
    rows = content["rows"]
    metric = next(name for name in rows[0]["quality"] if name != "n")
    panels = [("weights on disk, MB", [row["disk_bytes"] / 1e6 for row in rows])]
    for index, entry in enumerate(rows[0]["latency"]):
        label = f"latency at batch {entry['batch_size']}, ms (median)"
        panels.append((label, [row["latency"][index]["p50_ms"] for row in rows]))
    figure, axes = sheet(len(panels), 4.6, sharey=True)
    busy = bool(content.get("machine", {}).get("busy"))
    for number, (axis, (label, values)) in enumerate(zip(axes, panels, strict=True)):
        if number and busy:
            _busy_panel(axis)
        else:
            _panel(axis, rows, metric, values)
        axis.set_xlabel(label, color=INK)
    axes[0].set_ylabel(f"{metric} (bar: 95% interval)", color=INK)
    better = "smaller is to the left; speed: busy" if busy else "smaller and faster is to the left"
    written(figure, f"{content['name']}: {better}", path)


def _busy_panel(axis: Axes) -> None:
    """Says that there is nothing to show, and how to get it."""
    text = "the machine was busy\n\nmeasure again:\nhfcompress report RUN --measure"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=FAINT)
    axis.set_xticks([])
    tidy(axis)


def _panel(axis: Axes, rows: list[Mapping[str, Any]], metric: str, values: list[float]) -> None:
    quality = [row["quality"][metric] for row in rows]
    below = [max(q - row["quality_interval"][0], 0) for q, row in zip(quality, rows, strict=True)]
    above = [max(row["quality_interval"][1] - q, 0) for q, row in zip(quality, rows, strict=True)]
    axis.set_xscale("log")
    axis.plot(values, quality, color=FAINT, linewidth=1, zorder=1)
    for i, row in enumerate(rows):
        color = INK if i == 0 else ACCENT
        axis.errorbar(
            values[i],
            quality[i],
            yerr=[[below[i]], [above[i]]],
            fmt="o",
            color=color,
            capsize=3,
            markersize=5,
            zorder=2,
        )
        # Alternate above and below, so that neighbours with close values do not cover one another.
        offset = (0, 10) if i % 2 == 0 else (0, -16)
        edge = above[i] if i % 2 == 0 else -below[i]
        axis.annotate(
            row["stage"], (values[i], quality[i] + edge), xytext=offset, textcoords="offset points", ha="center",
            fontsize=8, color=color,
        )  # fmt: skip
    axis.margins(x=0.18, y=0.18)
    _plain_ticks(axis, values)
    tidy(axis)


def _plain_ticks(axis: Axes, values: list[float]) -> None:
    """Ticks at the measured values, thinned where they would touch: a log axis labels few of its own."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept: list[float] = []
    for value in sorted(values):
        if not kept or value / kept[-1] > 1.25:
            kept.append(value)
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
