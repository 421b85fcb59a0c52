"""The report as JSON, CSV, Markdown, table and plot."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hfcompress import cli
from hfcompress.report import conditions, report, tables
from hfcompress.utils.errors import HfcompressError
from tests import factories


def _content(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "tiny",
        "environment": {"cpu": "A processor", "cpu_flags": ["avx2"], "cores": 2, "accelerator": None, "versions": {}},
        "task": {"split": "test", "max_length": 16},
        "rows": list(rows),
    }


@pytest.fixture
def content() -> dict[str, Any]:
    return _content(
        factories.report_row("source", "source", 0.8, 10.0, 4_000_000),
        factories.report_row("01-distill", "distill", 0.76, 2.5, 1_000_000, speedup=4.0, compression=4.0),
        factories.report_row("02-quantize", "quantize", 0.75, 1.0, 250_000, speedup=None, encoder_parameters=None),
    )


def test_a_report_is_read_as_it_was_written(content: dict[str, Any], tmp_path: Path) -> None:
    report.write(content, tmp_path)
    assert report.read(tmp_path) == content
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.csv", "report.md", "report.html", "plots"}


def test_the_csv_has_one_line_a_model_and_every_figure(content: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.render_csv(content))))
    assert [row["stage"] for row in rows] == ["source", "01-distill", "02-quantize"]
    distilled = rows[1]
    assert float(distilled["accuracy"]) == 0.76
    assert [float(distilled[f"accuracy_{end}"]) for end in ("low", "high")] == content["rows"][1]["quality_interval"]
    assert [float(distilled[f"batch_{size}_p50_ms"]) for size in (1, 8)] == [2.5, 20.0]
    assert float(distilled["batch_8_speedup"]) == 4.0
    assert int(distilled["parameters"]) == 1_234_567
    assert rows[2]["encoder_parameters"] == rows[2]["speedup"] == ""


def test_the_markdown_table_has_as_many_cells_in_each_line(content: dict[str, Any]) -> None:
    lines = [line for line in tables.render_markdown(content).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3
    assert {line.count("|") for line in lines} == {len(tables.list_headings(content)) + 1}


def test_the_tables_cells_are_the_reports_figures(content: dict[str, Any]) -> None:
    cells = [dict(zip(tables.list_headings(content), row, strict=True)) for row in tables.format_cells(content)]
    assert cells[1] == {
        "model": "01-distill",
        "accuracy": "0.7600",
        "95% interval": "0.710-0.810",
        "of source": "95.0%",
        "parameters": "1.23M",
        "encoder": "7,654",
        "MB": "1",
        "smaller": "4.00x",
        "ms, batch 1": "2.50",
        "ms, batch 8": "20.00",
        "faster": "4.00x",
        "peak MB": "300",
    }
    assert (cells[2]["encoder"], cells[2]["faster"]) == ("-", "-")


def test_energy_is_a_column_only_where_it_was_measured(content: dict[str, Any]) -> None:
    assert "Wh / 1k" not in tables.list_headings(content)
    content["rows"][1]["energy_wh_per_1k"] = 0.01234567
    assert tables.list_headings(content)[-1] == "Wh / 1k"
    assert [row[-1] for row in tables.format_cells(content)] == ["-", "0.01235", "-"]


def test_a_source_that_scores_nothing_is_no_hundred_percent() -> None:
    content = _content(factories.report_row("source", quality=0.0), factories.report_row("01-distill", quality=0.5))
    column = tables.list_headings(content).index("of source")
    assert [row[column] for row in tables.format_cells(content)] == ["-", "-"]


def test_the_conditions_say_how_it_was_measured(content: dict[str, Any]) -> None:
    text = conditions.describe_conditions(content)
    for part in (
        "48 rows of the test split",
        "A processor (2 cores), avx2, 1 thread,",
        "12 tokens at batch 8",
        "16 tokens",
    ):
        assert part in text


# What is told of the machine, and of how well a ratio is known


@pytest.fixture
def timed(content: dict[str, Any]) -> dict[str, Any]:
    """A report of a run, of today, on two processors that were quiet."""
    machine = {**content["environment"], **factories.QUIET, "threads": [1, 2]}
    rows = [
        factories.report_row("source", "source", 0.8, 10.0, speedup=1.0, interval=(1.0, 1.0)),
        factories.report_row("01-distill", "distill", 0.76, 2.5, speedup=4.0, interval=(3.92, 4.125)),
        factories.report_row("02-quantize", "quantize", 0.75, 0.8, speedup=12.5, interval=(9.5, 14.25)),
    ]
    return content | {"key": "0", "machine": machine, "rows": rows}


def column(content: dict[str, Any], heading: str) -> list[str]:
    index = tables.list_headings(content).index(heading)
    return [row[index] for row in tables.format_cells(content)]


def test_a_ratio_stands_beside_its_interval(timed: dict[str, Any]) -> None:
    assert column(timed, "faster") == ["1.00x", "4.00x (3.92-4.12)", "12.50x (9.50-14.2)"]
    text = conditions.describe_conditions(timed)
    assert "the 95% interval of its median over 6 rounds" in text
    assert "varied too much to know the speed-up within 5%: 02-quantize at batch 1, 02-quantize at batch 8." in text
    assert "busy" not in tables.render_markdown(timed) + tables.render_csv(timed)


def test_the_csv_has_the_ends_of_the_interval_and_the_threads(timed: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(tables.render_csv(timed))))
    found = [rows[1][f"batch_8_{key}"] for key in ("speedup", "speedup_low", "speedup_high", "rounds", "threads")]
    assert found == ["4.0", "3.92", "4.125", "6", "1"]


def test_the_threads_of_each_batch_size_are_told(timed: dict[str, Any]) -> None:
    timed["rows"][0]["latency"][1]["threads"] = 2
    timed["rows"][2]["latency"][0]["runtime"] = "onnxruntime"
    said = "PyTorch on the fastest of 1 and 2 threads (source: 1 at batch 1, 2 at batch 8), graphs on 2,"
    assert said in conditions.describe_conditions(timed)
    timed["machine"]["threads"] = [1]
    assert ", 1 thread, each model" in conditions.describe_conditions(timed)


def test_where_it_was_timed_again_is_told(timed: dict[str, Any]) -> None:
    timed["machine"] |= {"cpu": "Another processor", "cores": 4, "cpu_flags": []}
    assert "on Another processor (4 cores), PyTorch" in conditions.describe_conditions(timed)


@pytest.fixture
def crowded(timed: dict[str, Any]) -> dict[str, Any]:
    """The same, and the machine was busy."""
    return timed | {"machine": {**timed["machine"], **factories.BUSY}}


def test_a_busy_machines_report_tells_no_speedup_and_how_to_time_anew(crowded: dict[str, Any]) -> None:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=250).print(tables.render_table(crowded))
    for text in (stream.getvalue(), tables.render_markdown(crowded), tables.render_csv(crowded)):
        assert "busy" in text
        assert not re.search(r"12\.5|4\.00x|3\.92|14\.2", text)
    assert column(crowded, "faster") == ["busy"] * 3
    assert "hfcompress report RUN --measure" in tables.render_markdown(crowded)
    assert "other work took 50% of the processors' time" in conditions.describe_conditions(crowded)


def test_a_busy_comparison_names_no_run(crowded: dict[str, Any]) -> None:
    del crowded["key"]
    assert "the same `hfcompress evaluate`" in conditions.describe_conditions(crowded)


def test_the_report_command_says_how_to_time_a_run_anew(crowded: dict[str, Any], tmp_path: Path) -> None:
    report.write(crowded, tmp_path)
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)], catch_exceptions=False)
    assert f"hfcompress report {tmp_path} --measure" in result.output


def test_the_terminals_table_shows_every_cell(content: dict[str, Any]) -> None:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=250).print(tables.render_table(content, wide=True))
    stream.write("\n".join(tables.describe_left_out(content, wide=True)))
    assert all(cell in stream.getvalue() for row in tables.format_cells(content) for cell in row)


def test_the_narrow_table_fits_80_columns_whatever_the_models_are_called(timed: dict[str, Any]) -> None:
    from rich.console import Console

    comparison = {"change": -0.0123, "reading": "within noise", "margin": "1%", "verdict": "not shown"}
    for row in timed["rows"][1:]:
        row["against_source"] = comparison
        row["stage"] = "a-directory/with-a-very-long-name-of-a-model"
    stream = io.StringIO()
    Console(file=stream, width=200).print(tables.render_table(timed))
    lines = stream.getvalue().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 80
    assert len(lines) == 6
    assert all(cell in stream.getvalue() for row in tables.format_cells(timed, wide=False) for cell in row[1:])


def test_long_paths_are_shortened_in_the_table_and_spelled_out_below(timed: dict[str, Any]) -> None:
    from rich.console import Console

    ends = ("bert/final", "mini/final", "mini/final:model_int8-of-today.onnx")
    names = [f"/home/someone/projects/{end}" for end in ends]
    for row, name in zip(timed["rows"], names, strict=True):
        row["stage"] = name
    for row in timed["rows"][1:]:
        row["against_source"] = {"change": -0.0123, "reading": "within noise", "margin": "1%", "verdict": "not shown"}
    stream = io.StringIO()
    Console(file=stream, width=200).print(tables.render_table(timed))
    _, _, _, *rows = (line.rstrip() for line in stream.getvalue().splitlines())
    short = [row.split()[0] for row in rows]
    assert max(map(len, rows)) <= 80
    assert short[:2] == ["bert/final", "mini/final"]
    assert re.fullmatch(r"final:mo.*….*-of-today\.onnx", short[2])
    told = tables.describe_left_out(timed)
    assert told == ["the same for all: smaller 1.00x", *(f"{a} = {b}" for a, b in zip(short, names, strict=True))]


def test_a_column_with_one_value_stands_below_the_table(timed: dict[str, Any], crowded: dict[str, Any]) -> None:
    assert tables.describe_left_out(timed) == ["the same for all: smaller 1.00x"]
    shown, constant = tables.split_columns(timed, wide=False)
    assert [column.heading for column in shown] == ["model", "accuracy", "speed @1", "speed @8"]
    assert [column.name for column in constant] == ["smaller"]
    assert tables.describe_left_out(crowded) == ["the same for all: smaller 1.00x"]  # `busy` is in the title
    assert "parameters 1.23M" in tables.describe_left_out(timed, wide=True)[0]
    assert tables.describe_left_out(timed | {"rows": timed["rows"][:1]}) == []


def _png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_report_command_prints_again_and_redraws(content: dict[str, Any], tmp_path: Path) -> None:
    report.write(content, tmp_path)
    plot = tmp_path / "plots" / "tradeoff.png"
    plot.unlink()
    (tmp_path / "report.md").unlink()
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert _png_size(plot)[0] > 900
    assert (tmp_path / "report.md").read_text() == tables.render_markdown(content)
    assert re.search(r"01-distill\s+0\.7600", result.output)
    assert str(plot) in result.output


def test_a_pipe_gets_no_control_characters(timed: dict[str, Any], tmp_path: Path) -> None:
    report.write(timed, tmp_path)
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path)], catch_exceptions=False)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.output)


def test_a_directory_without_a_report_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(HfcompressError, match=r"holds no report\.json\n.*hfcompress run"):
        report.read(tmp_path)


def test_no_cell_of_the_printed_table_is_cut_off(timed: dict[str, Any], tmp_path: Path) -> None:
    report.write(timed, tmp_path)
    result = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--wide"], catch_exceptions=False)
    assert "…" not in result.output
    assert all(cell in result.output for row in tables.format_cells(timed) for cell in row)
