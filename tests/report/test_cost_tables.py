"""What a model costs, in every form of the report: the grid of batch x length, throughput, starts, memory, bytes."""

from __future__ import annotations

import copy
import csv
import io
import re
from typing import Any

import pytest

from hfcompress.report import html_grid, tables
from hfcompress.report.conditions import describe_batch_sensitivity, describe_conditions
from hfcompress.report.cost_tables import list_cost_tables, render_cost_markdown, render_cost_tables
from hfcompress.report.gate import Check, Limits, check_limits
from hfcompress.report.html import render_html
from hfcompress.report.plain_runtime import list_plain_runtimes
from hfcompress.utils.errors import HfcompressError
from tests import factories


def _cell(batch: int, length: int, speedup: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {
        "device": "cpu", "runtime": "torch", "dtype": "float32", "threads": 1, "batch_size": batch,
        "sequence_length": length, "p50_ms": 8.0 / speedup, "p95_ms": 9.0, "p99_ms": 12.5, "samples_per_s": 1234.0,
        "rounds": 6, "speedup": speedup, "speedup_interval": [low, high], "narrow": high - low < 0.2, **more,
    }  # fmt: skip


@pytest.fixture
def content() -> dict[str, Any]:
    """A report with everything that can be measured."""
    source, small = (
        factories.report_row("source"),
        factories.report_row("01-quantize", speedup=3.0, interval=(2.9, 3.1)),
    )
    source |= {
        "latency_grid": [_cell(1, 16, 1.0, 1.0, 1.0), _cell(1, 64, 1.0, 1.0, 1.0)],
        "cold_start": {"seconds": 4.25, "import_seconds": 3.5, "load_seconds": 0.5, "starts": 3},
        "sustained": [{"threads": t, "batch_size": 8, "samples_per_s": 1000.0 * t} for t in (1, 2)],
        "embedding_bytes": 1_000_000, "device_memory_bytes": 40_000_000, "batch_sensitivity": None,
        "bytes_by_part": {"embeddings": 1_000_000, "encoder": 800_000, "head": 100_000, "other": 50_000},
    }  # fmt: skip
    small |= {
        "latency_grid": [
            _cell(1, 16, 4.0, 3.9, 4.0, runtime="onnxruntime", speedup_plain=2.0, plain="source in bfloat16"),
            _cell(1, 64, 0.5, 0.4, 0.9, runtime="onnxruntime", speedup_plain=0.25, plain="source in ONNX Runtime"),
        ],
        "cold_start": {"seconds": 0.5, "import_seconds": 0.25, "load_seconds": 0.125, "starts": 3},
        "sustained": [{"threads": 2, "batch_size": 8, "samples_per_s": 9000.0}],
        "batch_sensitivity": {"rows": 256, "answers_changed": 3, "largest_difference": 0.21},
    }  # fmt: skip
    plain = [
        {"name": name, "runtime": runtime, "dtype": dtype, "latency": source["latency"],
         "latency_grid": [_cell(1, 16, ratio, ratio, ratio), _cell(1, 64, ratio, ratio, ratio)]}
        for name, runtime, dtype, ratio in (("source in ONNX Runtime", "onnxruntime", "float32", 1.5),
                                            ("source in bfloat16", "torch", "bfloat16", 2.0))
    ]  # fmt: skip
    return {
        "name": "costs",
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None, "versions": {}},
        "task": {"split": "test", "max_length": 64},
        "machine": factories.QUIET,
        "plain_runtime": plain,
        "rows": [source, small],
    }


# Tables


def test_every_cell_has_its_quantiles_throughput_and_ratio(content: dict[str, Any]) -> None:
    grid, _ = list_cost_tables(content)
    assert grid.headings == ["model", "batch", "length", "p50 ms", "p95 ms", "p99 ms", "rows/s", "faster (95%)"]
    assert [row[:3] for row in grid.rows] == [
        [name, "1", length]
        for name in ("source", "source in ONNX Runtime", "source in bfloat16", "01-quantize")
        for length in ("16", "64")
    ]
    assert grid.rows[0] == ["source", "1", "16", "8.00", "9.00", "12.50", "1,234", "-"]
    assert [row[-1] for row in grid.rows[2:]] == [
        *["1.50x"] * 2,
        *["2.00x"] * 2,
        "4.00x (3.90-4.00)",
        "0.50x (0.40-0.90)",
    ]
    busy, _ = list_cost_tables(content | {"machine": factories.BUSY})
    assert {row[-1] for row in busy.rows} == {"busy"}


def test_throughput_has_a_column_for_each_number_of_threads(content: dict[str, Any]) -> None:
    _, sustained = list_cost_tables(content)
    assert sustained.title == "Sustained throughput at batch 8, rows/s by threads"
    assert sustained.headings == ["model", "1", "2"]
    assert sustained.rows == [["source", "1,000", "2,000"], ["01-quantize", "-", "9,000"]]


def test_both_are_in_the_markdown_and_the_terminal(content: dict[str, Any]) -> None:
    text = render_cost_markdown(content)
    assert "| 01-quantize | 1 | 64 | 16.00 | 9.00 | 12.50 | 1,234 | 0.50x (0.40-0.90) |" in text
    assert text in tables.render_markdown(content)
    grid, sustained = render_cost_tables(content)
    assert (grid.row_count, sustained.row_count) == (8, 2)


def test_a_report_of_before_has_no_such_tables() -> None:
    old = {"rows": [factories.report_row("source")]}
    assert list_cost_tables(old) == []
    assert render_cost_markdown(old) == ""


def test_the_wide_table_has_starts_memory_and_bytes(content: dict[str, Any]) -> None:
    cells = dict(zip(tables.list_headings(content), zip(*tables.format_cells(content), strict=True), strict=True))
    assert cells["cold start s (import)"] == ("4.25 (3.50)", "0.50 (0.25)")
    assert cells["peak GPU MB"] == ("40.0", "-")
    assert cells["encoder MB"] == ("0.8", "-")
    assert cells["rest MB"] == ("0.15", "-")
    narrow = tables.list_headings(content, wide=False)
    assert not {"cold start s (import)", "peak GPU MB", "encoder MB"} & set(narrow)


def test_every_figure_is_a_column_of_the_csv(content: dict[str, Any]) -> None:
    first, last = csv.DictReader(io.StringIO(tables.render_csv(content)))
    assert (last["batch_1_length_64_speedup"], last["batch_1_length_64_speedup_high"]) == ("0.5", "0.9")
    assert (first["cold_start_seconds"], last["cold_start_import_seconds"]) == ("4.25", "0.25")
    assert (first["sustained_samples_per_s_1_threads"], last["sustained_samples_per_s_2_threads"]) == (
        "1000.0",
        "9000.0",
    )
    assert (first["bytes_by_part_encoder"], last["batch_sensitivity_answers_changed"]) == ("800000", "3")
    assert "{" not in tables.render_csv(content)


def test_the_conditions_tell_starts_and_memory(content: dict[str, Any]) -> None:
    text = describe_conditions(content)
    assert "A cold start is the time from the start of a process to its first answer" in text
    assert "median of 3 starts" in text
    assert "that of the GPU is the memory of PyTorch's tensors" in text
    for row in content["rows"]:
        row |= {"cold_start": None, "device_memory_bytes": None}
    assert not re.search("cold start|GPU", describe_conditions(content))


def test_the_sentence_on_the_batch_names_what_changes() -> None:
    def told(**found: Any) -> str:
        return describe_batch_sensitivity({"batch_sensitivity": {"rows": 256, **found}})

    assert "3 of the first 256 answers change" in told(answers_changed=3, largest_difference=0.21)
    assert "the largest change of a logit is 0.21" in told(answers_changed=0, largest_difference=0.21)
    assert "do not depend" in told(answers_changed=0, largest_difference=0.0)
    assert "0.21 in 256 answers" in told(answers_changed=None, largest_difference=0.21)
    assert describe_batch_sensitivity({}) == describe_batch_sensitivity({"batch_sensitivity": None}) == ""


def test_the_plain_runtime_of_an_earlier_report_is_read() -> None:
    old = {"runtime": "onnxruntime", "dtype": "float32", "latency": [{"batch_size": 1, "speedup_plain": 1.0}]}
    (found,) = list_plain_runtimes({"plain_runtime": old})
    assert found["name"] == "source in ONNX Runtime"
    assert found["latency"] == [{"batch_size": 1, "speedup_plain": None}]
    assert list_plain_runtimes({}) == []


# The page


def test_a_heat_map_says_in_words_what_it_says_in_colour(content: dict[str, Any]) -> None:
    source, onnx, cast, small = html_grid.make_heat_maps(content)
    assert [each["name"] for each in (source, onnx, cast, small)] == [
        "source", "source in ONNX Runtime", "source in bfloat16", "01-quantize",
    ]  # fmt: skip
    assert small["lengths"] == [16, 64]
    (faster, slower), reference = small["rows"][0]["cells"], source["rows"][0]["cells"][0]
    assert (faster["kind"], faster["speedup"], faster["interval"]) == ("faster", "4.00x", "3.90 to 4.00")
    assert (slower["kind"], slower["speedup"], slower["unsteady"]) == ("slower", "0.50x", True)
    assert faster["strength"] == pytest.approx(2 * slower["strength"], abs=1)  # 4x is two doublings, 0.5x one halving
    assert (reference["kind"], reference["speedup"], reference["strength"]) == ("", "", 0)
    assert faster["plain"] == "2.0x against the source in bfloat16"
    busy = html_grid.make_heat_maps(content | {"machine": factories.BUSY})
    assert {cell["speedup"] for each in busy for row in each["rows"] for cell in row["cells"]} == {""}


def test_a_cell_that_one_model_lacks_is_empty(content: dict[str, Any]) -> None:
    content["rows"][1]["latency_grid"].append(_cell(32, 64, 2.0, 2.0, 2.0))
    small = html_grid.make_heat_maps(content)[-1]
    assert [row["batch"] for row in small["rows"]] == [1, 32]
    assert small["rows"][1]["cells"][0] is None


def test_the_page_has_the_maps_and_the_throughput(content: dict[str, Any]) -> None:
    page = render_html(content)
    assert 'id="latency-grid"' in page
    assert "▲ 4.00x" in page
    assert "▼ 0.50x" in page
    assert "9,000" in page
    old = copy.deepcopy(content)
    for row in old["rows"]:
        del row["latency_grid"], row["sustained"]
    for plain in old["plain_runtime"]:
        del plain["latency_grid"]
    page = render_html(old)
    assert 'id="latency-grid"' not in page
    assert 'id="throughput"' not in page


# The gate


def _judge(content: dict[str, Any], **limits: Any) -> Check:
    (check,) = check_limits(content, Limits(**limits))
    return check


def test_a_speedup_must_be_shown_in_every_cell(content: dict[str, Any]) -> None:
    check = _judge(content, min_speedup=2.0)
    assert (check.verdict, check.value, check.bound) == ("fail", 0.5, 0.4)
    assert check.sentence == "0.50x at batch 1x64, 95% interval 0.40-0.90; the worst of 4 cells"
    assert _judge(content, min_speedup=0.5).verdict == "not shown"
    assert _judge(content, min_speedup=0.4).verdict == "pass"
    assert _judge(content, min_speedup=0.5, by_estimate=True).verdict == "pass"


@pytest.mark.parametrize(
    ("at", "limit", "verdict"),
    [
        ("8", 2.9, "pass"),
        ("8", 3.0, "not shown"),
        ("1x16", 3.9, "pass"),
        ("1x16", 4.1, "fail"),
        ("1x64", 0.5, "not shown"),
    ],
)
def test_or_in_the_one_that_is_named(content: dict[str, Any], at: str, limit: float, verdict: str) -> None:
    check = _judge(content, min_speedup=limit, at=at)
    assert check.verdict == verdict
    assert check.limit == f"--min-speedup {limit:g} --at {at}"
    assert "cells" not in check.sentence


def test_a_cell_that_was_not_timed_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(HfcompressError, match="--at 2: that was not timed") as error:
        _judge(content, min_speedup=2.0, at="2")
    assert "1, 8, 1x16, 1x64" in str(error.value)


def test_a_cell_without_a_limit_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert factories.run_cli("gate", tmp_path / "report.json", "--max-mb", "3", "--at", "8") == 2
    assert "give --min-speedup too" in capsys.readouterr().err
