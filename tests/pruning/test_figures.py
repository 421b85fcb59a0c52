"""The pictures of a prune stage show what its notes say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hfcompress.pruning.figures import (
    describe_conditions,
    draw_kept,
    draw_latency,
    draw_sensitivity,
    format_milliseconds,
)
from hfcompress.report import report
from hfcompress.utils.figures import INK, save
from tests import factories


def kept(heads: list[list[int]], ffn: list[list[int]], layers: list[int], of: int) -> dict[str, Any]:
    return {"heads": heads, "ffn": ffn, "hidden": [32, 32], "layers": {"kept": layers, "of": of}}


def curves(depth: int) -> dict[str, Any]:
    lines = {
        block: [[0.9 - 0.01 * layer, 0.8 - 0.02 * layer - drop] for layer in range(depth)]
        for block, drop in (("heads", 0.0), ("ffn", 0.1))
    }
    return {"metric": "accuracy", "split": "dev", "rows": 1234, "whole": 0.95, "shares": [0.5, 1.0], **lines}


LATENCY = {
    "source_ms": 41.2, "target_ms": 20.6, "predicted_ms": 19.9, "measured_ms": 21.3, "batch_size": 32, "length": 128,
    "device": "A processor", "threads": 2, "dtype": "float32",
}  # fmt: skip


def test_the_heat_map_has_a_cell_for_each_block_and_an_empty_row_for_a_layer_that_is_gone() -> None:
    axis = draw_kept(kept([[3, 4], [0, 4]], [[48, 64], [1_024, 2_048]], [1, 3], 3)).axes[0]

    (image,) = axis.images
    shares = image.get_array().filled(np.nan)
    np.testing.assert_allclose(shares, [[0.75, 0.75], [np.nan, np.nan], [0.0, 0.5]])
    assert image.get_clim() == (0, 1)
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axis.texts}
    assert cells == {
        (0, 0): "3/4",
        (0, 1): "48/64",
        (1, 0.5): "layer cut",
        (2, 0): "0/4",
        (2, 1): "1,024/2,048",
    }
    assert [t.get_text() for t in axis.get_yticklabels()] == ["1", "2", "3"]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["attention heads\n3 of 8", "FFN neurons\n1,072 of 2,112"]


def test_the_text_of_a_full_cell_and_of_an_empty_one_can_be_read() -> None:
    axis = draw_kept(kept([[4, 4]], [[0, 64]], [1], 1)).axes[0]
    (image,) = axis.images

    for text in axis.texts:
        column = int(text.get_position()[0])
        ground = image.cmap(image.norm(image.get_array()[0, column]))
        ink = 0.0 if text.get_color() == INK else 1.0
        assert abs(np.mean(ground[:3]) - ink) > 0.5


def test_rows_stay_as_high_where_there_are_more_of_them(tmp_path: Path) -> None:
    heights = []
    for depth in (6, 24):
        shown = draw_kept(kept([[6, 12]] * depth, [[1536, 3072]] * depth, list(range(1, depth + 1)), depth))
        save(shown, "02-prune: what each layer keeps", tmp_path / "kept.png")
        heights.append(shown.axes[0].get_window_extent().height / depth)
    assert heights[0] == pytest.approx(heights[1], rel=0.1)


@pytest.mark.parametrize("depth", [1, 6, 24])
def test_the_curves_start_at_the_whole_model_and_follow_the_notes(depth: int) -> None:
    notes = curves(depth)
    shown = draw_sensitivity(notes)

    colors = []
    for axis, block in zip(shown.axes, ("heads", "ffn"), strict=False):
        *lines, whole = axis.lines
        assert [list(line.get_xdata()) for line in lines] == [[0, 0.5, 1.0]] * depth
        assert [list(line.get_ydata()) for line in lines] == [[0.95, *values] for values in notes[block]]
        assert list(whole.get_ydata()) == [0.95, 0.95]
        assert whole.get_linestyle() == "--"
        colors.append([to_hex(line.get_color()) for line in lines])
    assert colors[0] == colors[1]
    assert len(set(colors[0])) == depth
    assert shown.axes[0].get_ylabel() == "accuracy on 1,234 dev rows"
    assert [axis.get_xlabel() for axis in shown.axes[:2]] == [
        "share cut of one layer's attention heads",
        "share cut of one layer's FFN neurons",
    ]


def test_the_colour_bar_names_each_layer_by_its_line() -> None:
    shown = draw_sensitivity(curves(6))

    bar = shown.axes[2]
    (mesh,) = [c for c in bar.collections if c.get_array() is not None and c.get_array().size == 6]
    lines = [to_hex(line.get_color()) for line in shown.axes[0].lines[:-1]]
    assert [to_hex(mesh.cmap(mesh.norm(layer))) for layer in range(1, 7)] == lines
    assert bar.get_yticks().tolist() == [1, 2, 3, 4, 5, 6]
    low, high = bar.get_ylim()
    assert low > high, "the first layer is on top, as in the heat map"


def test_the_bars_are_the_latencies_and_a_line_is_the_target() -> None:
    axis = draw_latency(LATENCY).axes[0]

    assert [bar.get_width() for bar in axis.patches] == [41.2, 19.9, 21.3]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["before", "predicted", "measured"]
    (target,) = axis.lines
    assert list(target.get_xdata()) == [20.6, 20.6]
    assert {"41.2 ms", "19.9 ms", "21.3 ms", "target 20.6 ms"} == {t.get_text() for t in axis.texts}
    assert axis.get_xlabel() == "latency, ms\nbatch 32 of 128 tokens in float32 on A processor, 2 threads"


@pytest.mark.parametrize(("value", "text"), [(0.01234, "0.0123 ms"), (99.4, "99.4 ms"), (1234.5, "1,234 ms")])
def test_a_latency_has_three_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert format_milliseconds(value) == text


def test_threads_are_told_where_there_are_any() -> None:
    assert describe_conditions({**LATENCY, "threads": 1}).endswith("on A processor, 1 thread")
    assert describe_conditions({**LATENCY, "threads": None}).endswith("on A processor")
    assert describe_conditions({**LATENCY, "busy": True}).endswith("on A processor, 2 threads, which was busy")


WHOLE = kept([[4, 4]] * 2, [[64, 64]] * 2, [1, 2], 2)


@pytest.mark.parametrize(
    ("notes", "names"),
    [
        ({"kept": WHOLE, "sparsity": {"share": 0.5, "dense_bytes": 4e6, "sparse_bytes": 3e6}}, []),
        ({"kept": {**WHOLE, "hidden": [24, 32]}}, []),
        ({"kept": {**WHOLE, "heads": [[4, 4], [3, 4]]}}, ["02-prune-kept.png"]),
        ({"kept": kept([[4, 4]], [[64, 64]], [2], 2)}, ["02-prune-kept.png"]),
        ({"kept": WHOLE, "latency": LATENCY, "sensitivity": curves(2)},
         ["02-prune-sensitivity.png", "02-prune-latency.png"]),
    ],
)  # fmt: skip
def test_a_report_draws_what_its_stages_have_notes_on(notes: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    content = {
        "name": "tiny",
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None},
        "task": {"split": "test", "max_length": 16},
        "rows": [factories.report_row("source"), factories.report_row("02-prune", "prune")],
    }
    assert list(report.list_pictures(content)) == ["tradeoff.png"]
    content["cuts"] = {"02-prune": notes}

    report.write(content, tmp_path)

    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"tradeoff.png", *names}
    assert list(report.list_pictures(content)) == ["tradeoff.png", *names]
