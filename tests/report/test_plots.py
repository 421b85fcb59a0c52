"""The picture of a run: every model is in it, labels can be read, and nothing of a busy machine is drawn."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from hfcompress.report import plots
from hfcompress.utils.figures import WIDTH
from tests import factories


def _content(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None},
        "task": {"split": "test", "max_length": 16},
        "rows": list(rows),
    } | more


def _many(count: int, names: str = "/models/of/somebody/{n:02d}-a-variant-of-the-model") -> dict[str, Any]:
    draw = np.random.default_rng(count)
    figures = [(draw.uniform(0.88, 0.93), draw.uniform(2, 6), int(draw.uniform(1e6, 5e6))) for _ in range(count)]
    return _content(*(factories.report_row(names.format(n=n), "distill", *f) for n, f in enumerate(figures)))


@pytest.fixture
def content() -> dict[str, Any]:
    return _content(
        factories.report_row("source", "source", 0.8, 10.0, 4_000_000),
        factories.report_row("01-distill", "distill", 0.76, 2.5, 1_000_000),
        factories.report_row("02-quantize", "quantize", 0.75, 1.0, 250_000),
        key="0",
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Draws a report; returns the figure that was saved."""
    saved: list[Figure] = []
    monkeypatch.setattr(plots, "write", lambda figure, path: saved.append(figure))

    def draw(content: dict[str, Any]) -> Figure:
        plots.draw_tradeoff(content, tmp_path / "plot.png")
        saved[-1].canvas.draw()
        return saved[-1]

    return draw


def _labels(axis: Any) -> list[Annotation]:
    return [text for text in axis.texts if isinstance(text, Annotation)]


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("count", [3, 12])
def test_labels_cover_nothing_and_stay_inside_their_axes(drawn: Any, count: int) -> None:
    figure = drawn(_many(count))
    assert len(figure.axes) == 3
    for axis in figure.axes:
        boxes = [Text.get_window_extent(label) for label in _labels(axis)]
        area = axis.get_window_extent()
        assert len(boxes) == len(axis.containers) == count
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert all(area.x0 <= box.x0 and box.x1 <= area.x1 for box in boxes)
        assert all(area.y0 <= box.y0 and box.y1 <= area.y1 for box in boxes)
        places = [[float(value[0]) for value in each[0].get_data()] for each in axis.containers]
        points = axis.transData.transform(places)
        assert not [(point, box) for point in points for box in boxes if box.contains(*point)]


def test_names_that_do_not_fit_become_letters_that_the_legend_explains(drawn: Any) -> None:
    figure = drawn(_many(12))
    assert {label.get_text() for label in _labels(figure.axes[0])} == set("ABCDEFGHIJKL")
    assert _legend(figure)[:2] == ["A  00-a-variant-of-the-model", "B  01-a-variant-of-the-model"]
    assert len(_legend(figure)) == 12 + 2
    assert plots._list_letters(28)[-2:] == ["A2", "B2"]


def test_legend_and_ticks_are_inside_the_figure_and_legible_on_a_card(drawn: Any) -> None:
    for figure in (drawn(_many(12)), drawn(_many(3, "{n}"))):
        whole = figure.bbox
        assert figure.get_figwidth() == WIDTH
        shown = figure.get_tightbbox().transformed(figure.dpi_scale_trans)
        assert whole.x0 <= shown.x0
        assert shown.x1 <= whole.x1
        assert whole.y0 <= shown.y0
        assert shown.y1 <= whole.y1
        texts = [t for axis in figure.axes for t in (*axis.texts, *axis.get_xticklabels(), axis.xaxis.label)]
        pixels = 600 / WIDTH / 72
        assert min(text.get_fontsize() * pixels for text in [*texts, *figure.legends[0].get_texts()]) > 9


def test_every_model_its_interval_and_the_units_are_drawn(drawn: Any, content: dict[str, Any]) -> None:
    figure = drawn(content)
    assert [[label.get_text() for label in _labels(axis)] for axis in figure.axes] == [
        ["source", "01-distill", "02-quantize"]
    ] * 3
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "weights on disk, MB", "median latency at batch 1, ms", "median latency at batch 8, ms",
    ]  # fmt: skip
    assert {axis.get_ylabel() for axis in figure.axes} == {"accuracy"}
    point, _, (bar,) = figure.axes[1].containers[1]
    assert [value.item() for value in point.get_data()] == [2.5, 0.76]
    (((x, low), (_, high)),) = bar.get_segments()
    assert (x, low, high) == pytest.approx((2.5, 0.71, 0.81))
    assert [each[0].get_marker() for each in figure.axes[0].containers] == ["s", "o", "D"]
    assert _legend(figure) == ["source", "model", "last model", "95% interval", "Pareto front"]


def test_the_dashed_line_joins_what_no_model_beats(drawn: Any, content: dict[str, Any]) -> None:
    content["rows"][1]["quality"]["accuracy"] = 0.5  # larger and worse than the last one
    front = drawn(content).axes[0].lines[0]
    assert [list(values) for values in front.get_data()] == [[0.25, 4.0], [0.75, 0.8]]


def test_the_plot_of_a_busy_machine_draws_sizes_alone(drawn: Any, content: dict[str, Any]) -> None:
    figure = drawn(content | {"machine": factories.BUSY})
    assert [len(axis.containers) for axis in figure.axes] == [3, 0, 0]
    assert all("hfcompress report RUN --measure" in axis.texts[0].get_text() for axis in figure.axes[1:])
    assert "faster" not in figure.get_suptitle()
    assert "the same hfcompress evaluate" in drawn(_many(3) | {"machine": factories.BUSY}).axes[1].texts[0].get_text()


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_there_is_a_panel_for_the_size_and_one_for_each_batch(
    drawn: Any, content: dict[str, Any], batches: int
) -> None:
    entry = content["rows"][0]["latency"][0]
    for row in content["rows"]:
        row["latency"] = [entry | {"batch_size": 1 + n} for n in range(batches)]
    assert len(drawn(content).axes) == 1 + batches


def test_a_model_of_unknown_quality_is_left_out(drawn: Any, content: dict[str, Any]) -> None:
    content["rows"][1]["quality"]["accuracy"] = float("nan")
    content["rows"][2]["quality_interval"] = [float("nan")] * 2
    assert [label.get_text() for label in _labels(drawn(content).axes[0])] == ["source", "02-quantize"]
