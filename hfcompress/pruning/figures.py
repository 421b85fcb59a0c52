"""What a prune stage left of each layer, what each layer can spare, and how near the latency came to its prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.report.plots import ACCENT, FAINT, INK, sheet, tidy, written

UNITS = {"heads": "attention heads", "ffn": "FFN neurons"}
"""The blocks of a layer: as the notes call their units, and as people do."""
BARS = {"source": "before", "predicted": "predicted", "measured": "measured"}
"""The latencies that are drawn as bars: as the notes call them, and as people do."""
SHARES = ("#fff7ed", "#fdba74", "#9a3412")
"""Colours from nothing kept to everything kept."""


def kept(stage: str, notes: Mapping[str, Any], path: Path) -> None:
    """Draws a heat map of the heads and neurons that each layer keeps; the row of a layer that is gone is empty.

    Args:
        stage: The stage's name.
        notes: `heads` and `ffn`, `[[kept, of], …]` of the layers that are left; `layers`, their numbers.
        path: The PNG to write.
    """
    from matplotlib.colors import LinearSegmentedColormap

    places, rows = [number - 1 for number in notes["layers"]["kept"]], notes["layers"]["of"]
    figure, (axis,) = sheet(1, 5.0, 0.75 + 0.3 * max(rows, 3))
    shares = [[float("nan")] * len(UNITS) for _ in range(rows)]
    for column, block in enumerate(UNITS):
        for place, (count, of) in zip(places, notes[block], strict=True):
            share = shares[place][column] = count / of if of else 0.0
            color = "white" if share > 0.7 else INK
            axis.text(column, place, f"{count:,}/{of:,}", ha="center", va="center", fontsize=8, color=color)
    for place in sorted(set(range(rows)) - set(places)):
        axis.text(0.5, place, "layer cut", ha="center", va="center", fontsize=8, color=FAINT)
    image = axis.imshow(shares, LinearSegmentedColormap.from_list("", SHARES), vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(UNITS)), [f"{name}\n{total(notes[block])}" for block, name in UNITS.items()])
    axis.set_yticks(range(rows), [str(row + 1) for row in range(rows)])
    axis.set_ylabel("layer", color=INK)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=8, colors=INK)
    for edge in range(1, rows):
        axis.axhline(edge - 0.5, color="white", linewidth=1.5)
    axis.axvline(0.5, color="white", linewidth=3)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, aspect=15 + 2 * rows, format=lambda value, _: f"{value:.0%}")
    _plain(bar, "share kept")
    written(figure, f"{stage}: what each layer keeps", path)


def _plain(bar: Any, label: str) -> None:
    bar.set_label(label, color=INK)
    bar.ax.tick_params(which="both", length=0, labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def total(pairs: Sequence[Sequence[int]]) -> str:
    """`[[kept, of], …]` of all layers together, as text."""
    return f"{sum(count for count, _ in pairs):,} of {sum(of for _, of in pairs):,}"


def sensitivity(stage: str, notes: Mapping[str, Any], path: Path) -> None:
    """Draws the metric against what one layer alone loses, a line a layer: a panel for heads and one for neurons.

    Args:
        stage: The stage's name.
        notes: What `stages/sensitivity.py` found.
        path: The PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depth, whole, shares = len(notes["heads"]), notes["whole"], [0, *notes["shares"]]
    # The palest yellow is left out: it does not show on white.
    colors = [colormaps["viridis_r"](0.1 + 0.9 * layer / max(depth - 1, 1)) for layer in range(depth)]
    figure, axes = sheet(len(UNITS), 4.6, sharey=True)
    for axis, (block, name) in zip(axes, UNITS.items(), strict=True):
        for color, values in zip(colors, notes[block], strict=True):
            axis.plot(shares, [whole, *values], marker="o", markersize=3.5, linewidth=1.4, color=color)
        axis.axhline(whole, color=INK, linewidth=1, linestyle="--")
        axis.set_xticks(shares)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel(f"share cut of one layer's {name}", color=INK)
        tidy(axis)
    axes[0].annotate(
        "whole model", (1, whole), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", va="bottom", fontsize=8, color=INK,
    )  # fmt: skip
    axes[0].margins(y=0.08)
    axes[0].set_ylabel(f"{notes['metric']} on {notes['rows']:,} {notes['split']} rows", color=INK)
    steps = BoundaryNorm([layer + 0.5 for layer in range(depth + 1)], depth)
    ticks = range(1, depth + 1, 1 + depth // 13)
    bar = figure.colorbar(ScalarMappable(steps, ListedColormap(colors)), ax=axes, ticks=ticks)
    _plain(bar, "layer")
    bar.ax.invert_yaxis()
    written(figure, f"{stage}: what each layer can spare", path)


def latency(stage: str, notes: Mapping[str, Any], path: Path) -> None:
    """Draws bars for the latency before, as it was predicted and as it was measured, and a line for the target.

    Args:
        stage: The stage's name.
        notes: `source_ms`, `target_ms`, `predicted_ms`, `measured_ms` and how they were measured.
        path: The PNG to write.
    """
    figure, (axis,) = sheet(1, 6.4, 2.4)
    values = [notes[f"{name}_ms"] for name in BARS]
    bars = axis.barh(list(BARS.values()), values, height=0.6, color=[INK, FAINT, ACCENT])
    axis.bar_label(bars, [milliseconds(value) for value in values], padding=4, fontsize=8, color=INK)
    axis.axvline(notes["target_ms"], color=INK, linewidth=1, linestyle="--")
    axis.annotate(
        f"target {milliseconds(notes['target_ms'])}", (notes["target_ms"], 1), xycoords=("data", "axes fraction"),
        xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8, color=INK,
    )  # fmt: skip
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel(f"latency, ms\n{conditions(notes)}", fontsize=8, color=INK)
    axis.tick_params(axis="y", length=0, colors=INK)
    tidy(axis, "x")
    written(figure, f"{stage}: predicted and measured latency", path)


def milliseconds(value: float) -> str:
    """A latency with three digits, or all that stand before the point."""
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def conditions(notes: Mapping[str, Any]) -> str:
    """How the latency of a budget was measured."""
    threads = f", {notes['threads']} thread{'s' * (notes['threads'] != 1)}" if notes["threads"] else ""
    busy = ", which was busy" if notes.get("busy") else ""
    where = f"{notes['device']}{threads}{busy}"
    return f"batch {notes['batch_size']} of {notes['length']} tokens in {notes['dtype']} on {where}"


PICTURES: dict[str, Callable[[str, Mapping[str, Any], Path], None]] = {
    "kept": kept,
    "sensitivity": sensitivity,
    "latency": latency,
}
"""By the key of a prune stage's notes that each is drawn from."""


def drawn(notes: Mapping[str, Any]) -> list[str]:
    """The pictures that a prune stage's notes have something to show in: where all is kept, there is no heat map."""
    kept_, layers = notes["kept"], notes["kept"]["layers"]
    cut = len(layers["kept"]) < layers["of"] or any(count < of for block in UNITS for count, of in kept_[block])
    return [key for key in PICTURES if key in notes and (key != "kept" or cut)]
