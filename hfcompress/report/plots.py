"""The picture of a whole run: quality against size and latency, with a point and an interval for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import find_metric, name_timing_command, was_busy
from hfcompress.report.labels import Box, Mark, place_labels
from hfcompress.report.names import list_names, shorten_names
from hfcompress.report.tradeoff import Model, Panel, list_log_ticks, list_panels
from hfcompress.utils.figures import ACCENT, BLUE, FAINT, INK, SMALL, add_title, make_grid, settle, tidy, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = {"source": ("s", INK, "source"), "model": ("o", BLUE, "model"), "last": ("D", ACCENT, "last model")}
"""Marker, colour and name of each kind of model: whoever cannot tell the colours apart sees the shapes."""
HEIGHT, LEGEND_LINE = 2.6, 0.17
"""Inches of a panel, and of a line of the legend."""
LONGEST, SHORT = 20, 4
"""Characters of a label at most, and of one that needs a line to its point if it stands apart."""
CHARACTER = 0.6 * SMALL
"""Width of a character of the legend in points, for wide ones."""


def draw_tradeoff(content: Mapping[str, Any], path: Path) -> None:
    """Draws a panel for the size and one for the latency at each batch size.

    The models are labelled by their names; if these do not all fit, by letters, which the legend explains. Times of a
    busy machine are not drawn, because their ratios mean nothing.
    """
    names = list_names(content)
    figure, fits = _draw(content, dict(zip(names, shorten_names(names, LONGEST), strict=True)))
    if not fits:
        figure, _ = _draw(content, dict(zip(names, _list_letters(len(names)), strict=True)), letters=True)
    write(figure, path)


def _list_letters(count: int) -> list[str]:
    """Lists A to Z, then A2 to Z2 and so on."""
    return [ascii_uppercase[n % 26] + (str(n // 26 + 1) if n >= 26 else "") for n in range(count)]


def _draw(content: Mapping[str, Any], labels: Mapping[str, str], letters: bool = False) -> tuple[Figure, bool]:
    """Draws the figure; False with it if a label found no place."""
    panels, busy = list_panels(content), was_busy(content)
    figure, axes = make_grid(len(panels), HEIGHT)
    for axis, panel in zip(axes, panels, strict=True):
        if panel.models:
            _draw_panel(axis, panel)
        else:
            _draw_empty_panel(axis, content)
        axis.set_xlabel(f"{panel.title}, {panel.unit}", color=INK)
        axis.set_ylabel(find_metric(content), color=INK)
    add_title(figure, f"{content['name']}: smaller {'' if busy else 'and faster '}is to the left")
    _add_legend(figure, panels, labels if letters else {})
    settle(figure)
    placed = [_label(axis, panel, labels) for axis, panel in zip(axes, panels, strict=True)]
    return figure, all(placed)


def _draw_empty_panel(axis: Axes, content: Mapping[str, Any]) -> None:
    """Writes into an empty panel why it is empty and how to time the models again."""
    text = "nothing to draw"
    if was_busy(content):
        text = f"the machine was busy\n\nmeasure again:\n{name_timing_command(content).replace('`', '')}"
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=SMALL, color=FAINT)
    axis.set_xticks([])
    axis.set_yticks([])
    tidy(axis)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.set_xscale("log")
    front = [panel.models[n] for n in panel.front]
    axis.plot([m.cost for m in front], [m.quality for m in front], color=FAINT, linewidth=1, linestyle="--", zorder=1)
    for model in panel.models:
        marker, color, _ = MARKERS[model.kind]
        ends = [[max(model.quality - model.low, 0)], [max(model.high - model.quality, 0)]]
        axis.errorbar(
            model.cost, model.quality, yerr=ends, fmt=marker, color=color, ecolor=(color, 0.5), capsize=2,
            elinewidth=1, markersize=5, zorder=2,
        )  # fmt: skip
    axis.margins(x=0.12, y=0.1)
    _set_ticks(axis, [model.cost for model in panel.models])
    tidy(axis)


def _set_ticks(axis: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.xaxis.set_major_locator(FixedLocator(list_log_ticks(values)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _add_legend(figure: Figure, panels: Sequence[Panel], letters: Mapping[str, str]) -> None:
    """Explains markers and lines below the panels, or each model if models are labelled by letters."""
    from matplotlib.lines import Line2D

    models = {model.name: model.kind for panel in panels for model in panel.models}
    kinds = [kind for kind in MARKERS if kind in models.values()]
    keys = [_make_key(f"{letters[name]}  {name}", kind) for name, kind in models.items() if letters] or [
        _make_key(MARKERS[kind][2], kind) for kind in kinds
    ]
    keys += [
        Line2D([], [], color=INK, marker="|", markersize=9, linestyle="", label="95% interval"),
        Line2D([], [], color=FAINT, linestyle="--", linewidth=1, label="Pareto front"),
    ]
    longest = max(len(str(key.get_label())) for key in keys) * CHARACTER + 30
    columns = max(1, int(figure.get_figwidth() * 72 // longest)) if letters else len(keys)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * ceil(len(keys) / columns))
    figure.legend(
        handles=keys, loc="outside lower left", ncols=columns, frameon=False, fontsize=SMALL, labelcolor=INK,
        handlelength=1.6, columnspacing=1.2,
    )  # fmt: skip


def _make_key(name: str, kind: str) -> Line2D:
    from matplotlib.lines import Line2D

    marker, color, _ = MARKERS[kind]
    return Line2D([], [], linestyle="", marker=marker, color=color, markersize=5, label=name)


def _label(axis: Axes, panel: Panel, labels: Mapping[str, str]) -> bool:
    """Labels the points of a panel whose layout is settled; False if a label finds no place."""
    from matplotlib.patheffects import withStroke

    models, figure = panel.models, axis.get_figure(root=True)
    assert figure is not None
    scale, height = 72 / figure.dpi, figure.bbox.height

    def find(model: Model, quality: float) -> tuple[float, float]:
        x, y = axis.transData.transform((model.cost, quality))
        return x * scale, (height - y) * scale

    sizes = [_measure(axis, labels[model.name], scale) for model in models]
    marks = [
        Mark(*find(model, model.quality), find(model, model.low)[1], find(model, model.high)[1], *size)
        for model, size in zip(models, sizes, strict=True)
    ]
    places = place_labels(marks, _find_area(axis, scale, height), panel.front)
    for model, mark, place in zip(models, marks, places, strict=True):
        if place is not None:
            left, top, right, bottom = place.box
            offset = ((left + right) / 2 - mark.x, mark.y - (top + bottom) / 2)
            is_far = abs(offset[1]) > mark.height and len(labels[model.name]) < SHORT
            axis.annotate(
                labels[model.name], (model.cost, model.quality), xytext=offset, textcoords="offset points",
                ha="center", va="center", fontsize=SMALL, color=INK,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0} if is_far else None,
            )  # fmt: skip
    return all(places)


def _measure(axis: Axes, label: str, scale: float) -> tuple[float, float]:
    """Measures the width and height of a label in points."""
    text = axis.text(0, 0, label, fontsize=SMALL)
    box = text.get_window_extent()
    text.remove()
    return box.width * scale, box.height * scale


def _find_area(axis: Axes, scale: float, height: float) -> Box:
    box = axis.get_window_extent()
    return box.x0 * scale + 1, (height - box.y1) * scale + 1, box.x1 * scale - 1, (height - box.y0) * scale - 1
