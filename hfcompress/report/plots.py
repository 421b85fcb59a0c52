"""The plot of a whole run: quality against size and latency, with a point and an interval for each model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.utils.figures import ACCENT, FAINT, INK, make_panels, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_tradeoff(content: Mapping[str, Any], path: Path) -> None:
    """Draws a panel for the size and one for the latency at each batch size; all share the quality axis.

    Times of a busy machine are not drawn, because their ratios mean nothing.
    """
    rows = content["rows"]
    metric = find_metric(content)
    panels = [("weights on disk, MB", [row["disk_bytes"] / 1e6 for row in rows])]
    for index, entry in enumerate(rows[0]["latency"]):
        label = f"latency at batch {entry['batch_size']}, ms (median)"
        panels.append((label, [row["latency"][index]["p50_ms"] for row in rows]))
    figure, axes = make_panels(len(panels), 4.6, sharey=True)
    busy = was_busy(content)
    for number, (axis, (label, values)) in enumerate(zip(axes, panels, strict=True)):
        if number and busy:
            _draw_busy_panel(axis)
        else:
            _draw_panel(axis, rows, metric, values)
        axis.set_xlabel(label, color=INK)
    axes[0].set_ylabel(f"{metric} (bar: 95% interval)", color=INK)
    better = "smaller is to the left; speed: busy" if busy else "smaller and faster is to the left"
    save(figure, f"{content['name']}: {better}", path)


def _draw_busy_panel(axis: Axes) -> None:
    """Writes into an empty panel why it is empty and how to time the models again."""
    text = "the machine was busy\n\nmeasure again:\nhfcompress report RUN --measure"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=FAINT)
    axis.set_xticks([])
    tidy(axis)


def _draw_panel(axis: Axes, rows: list[Mapping[str, Any]], metric: str, values: list[float]) -> None:
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
    _set_ticks(axis, values)
    tidy(axis)


def _set_ticks(axis: Axes, values: list[float]) -> None:
    """Puts ticks at the measured values that do not overlap; by itself, a log axis labels only few values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept: list[float] = []
    for value in sorted(values):
        if not kept or value / kept[-1] > 1.25:
            kept.append(value)
    axis.xaxis.set_major_locator(FixedLocator(kept))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
