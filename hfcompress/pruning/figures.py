"""Figures of a prune stage: the units that each layer keeps, the sensitivity of layers, the latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.utils.figures import ACCENT, FAINT, INK, Figure, make_panels, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

UNITS = {"heads": "attention heads", "ffn": "FFN neurons"}
"""The units of a layer: their key in the facts, and their name."""
BARS = {"source": "before", "predicted": "predicted", "measured": "measured"}
"""The latencies that are drawn as bars: their key in the facts, and the bar's label."""
SHARES = ("#fff7ed", "#fdba74", "#9a3412")
"""Colours from nothing kept to everything kept."""


def list_figures(facts: Mapping[str, Any]) -> list[Figure]:
    """Lists the figures for which there are facts; there is no heat map if nothing was cut."""
    found = []
    layers, units = facts["kept"]["layers"], [pair for block in UNITS for pair in facts["kept"][block]]
    if len(layers["kept"]) < layers["of"] or any(count < of for count, of in units):
        caption = "Attention heads and FFN neurons that each layer keeps."
        found.append(Figure("kept", "what each layer keeps", caption, partial(draw_kept, facts["kept"])))
    if "sensitivity" in facts:
        caption = "The metric when one layer alone loses its least important heads or neurons, before pruning."
        draw = partial(draw_sensitivity, facts["sensitivity"])
        found.append(Figure("sensitivity", "what each layer can spare", caption, draw))
    if "latency" in facts:
        caption = "The latency predicted from the timings of single blocks, and the measured latency of the model."
        draw = partial(draw_latency, facts["latency"])
        found.append(Figure("latency", "predicted and measured latency", caption, draw))
    return found


def draw_kept(kept: Mapping[str, Any]) -> Drawing:
    """Draws a heat map of the heads and neurons that each layer keeps; the row of a dropped layer is empty.

    Args:
        kept: `heads` and `ffn`: `[[kept, of], …]` for the layers that are left; `layers`: their numbers.
    """
    from matplotlib.colors import LinearSegmentedColormap

    places, rows = [number - 1 for number in kept["layers"]["kept"]], kept["layers"]["of"]
    figure, (axis,) = make_panels(1, 5.0, 0.75 + 0.3 * max(rows, 3))
    shares = [[float("nan")] * len(UNITS) for _ in range(rows)]
    for column, block in enumerate(UNITS):
        for place, (count, of) in zip(places, kept[block], strict=True):
            share = shares[place][column] = count / of if of else 0.0
            color = "white" if share > 0.7 else INK
            axis.text(column, place, f"{count:,}/{of:,}", ha="center", va="center", fontsize=8, color=color)
    for place in sorted(set(range(rows)) - set(places)):
        axis.text(0.5, place, "layer cut", ha="center", va="center", fontsize=8, color=FAINT)
    image = axis.imshow(shares, LinearSegmentedColormap.from_list("", SHARES), vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(UNITS)), [f"{name}\n{format_total(kept[block])}" for block, name in UNITS.items()])
    axis.set_yticks(range(rows), [str(row + 1) for row in range(rows)])
    axis.set_ylabel("layer", color=INK)
    axis.xaxis.tick_top()
    axis.tick_params(length=0, labelsize=8, colors=INK)
    for edge in range(1, rows):
        axis.axhline(edge - 0.5, color="white", linewidth=1.5)
    axis.axvline(0.5, color="white", linewidth=3)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, aspect=15 + 2 * rows, format=lambda value, _: f"{value:.0%}")
    _label_bar(bar, "share kept")
    return figure


def _label_bar(bar: Any, label: str) -> None:
    bar.set_label(label, color=INK)
    bar.ax.tick_params(which="both", length=0, labelsize=8, colors=INK)
    bar.outline.set_visible(False)


def draw_sensitivity(sensitivity: Mapping[str, Any]) -> Drawing:
    """Draws the metric against the share that one layer alone loses: one line for each layer, in two panels.

    Args:
        sensitivity: The facts of `pruning/sensitivity.py`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    depth, whole, shares = len(sensitivity["heads"]), sensitivity["whole"], [0, *sensitivity["shares"]]
    # The palest yellow is left out: it does not show on white.
    colors = [colormaps["viridis_r"](0.1 + 0.9 * layer / max(depth - 1, 1)) for layer in range(depth)]
    figure, axes = make_panels(len(UNITS), 3.2, 3.0, sharey=True)
    for axis, (block, name) in zip(axes, UNITS.items(), strict=True):
        for color, values in zip(colors, sensitivity[block], strict=True):
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
    rows = f"{sensitivity['rows']:,} {sensitivity['split']} rows"
    axes[0].set_ylabel(f"{sensitivity['metric']} on {rows}", color=INK)
    steps = BoundaryNorm([layer + 0.5 for layer in range(depth + 1)], depth)
    ticks = range(1, depth + 1, 1 + depth // 13)
    bar = figure.colorbar(ScalarMappable(steps, ListedColormap(colors)), ax=axes, ticks=ticks)
    _label_bar(bar, "layer")
    bar.ax.invert_yaxis()
    return figure


def draw_latency(latency: Mapping[str, Any]) -> Drawing:
    """Draws bars of the latency before pruning, predicted and measured, and a line at the target.

    Args:
        latency: `source_ms`, `target_ms`, `predicted_ms`, `measured_ms` and the conditions.
    """
    from matplotlib.patheffects import withStroke

    figure, (axis,) = make_panels(1, 6.4, 2.4)
    values = [latency[f"{name}_ms"] for name in BARS]
    bars = axis.barh(list(BARS.values()), values, height=0.6, color=[INK, FAINT, ACCENT])
    axis.bar_label(
        bars, [format_milliseconds(value) for value in values], padding=4, fontsize=8, color=INK,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip
    axis.axvline(latency["target_ms"], color=INK, linewidth=1, linestyle="--")
    target = f"target {format_milliseconds(latency['target_ms'])}"
    axis.annotate(
        target, (latency["target_ms"], 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", fontsize=8, color=INK,
    )  # fmt: skip
    axis.invert_yaxis()
    axis.margins(x=0.14)
    axis.set_xlabel(f"latency, ms\n{describe_conditions(latency)}", fontsize=8, color=INK)
    axis.tick_params(axis="y", length=0, colors=INK)
    tidy(axis, "x")
    return figure


def format_total(pairs: Sequence[Sequence[int]]) -> str:
    """Formats the sum of `[[kept, of], …]` over all layers."""
    return f"{sum(count for count, _ in pairs):,} of {sum(of for _, of in pairs):,}"


def format_milliseconds(value: float) -> str:
    """Formats a latency with three digits, or with all digits before the point."""
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def describe_conditions(latency: Mapping[str, Any]) -> str:
    """Describes how the latency of a budget was measured."""
    threads = f", {latency['threads']} thread{'s' * (latency['threads'] != 1)}" if latency["threads"] else ""
    busy = ", which was busy" if latency.get("busy") else ""
    where = f"{latency['device']}{threads}{busy}"
    return f"batch {latency['batch_size']} of {latency['length']} tokens in {latency['dtype']} on {where}"
