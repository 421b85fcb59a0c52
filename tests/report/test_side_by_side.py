"""Reports of several runs in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.report.side_by_side import describe_seeds, join_reports
from hfcompress.utils.errors import HfcompressError
from tests import factories


def _content(quality: float, name: str = "mine", busy: bool = False, **task: Any) -> dict[str, Any]:
    return {
        "name": name,
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None, "versions": {}},
        "machine": {"busy": busy, "why": []},
        "task": {"split": "test", "max_length": 16, "dataset": "data", **task},
        "rows": [factories.report_row("source", quality=0.9), factories.report_row("02-quantize", quality=quality)],
    }


def test_the_last_models_stand_side_by_side_under_the_names_of_their_runs() -> None:
    found = join_reports({"runs/one": _content(0.8), "runs/two": _content(0.7)})
    assert [row["stage"] for row in found["rows"]] == ["source", "runs/one", "runs/two"]
    assert [row["quality"]["accuracy"] for row in found["rows"]] == [0.9, 0.8, 0.7]


def test_one_busy_run_makes_the_table_busy() -> None:
    assert join_reports({"one": _content(0.8), "two": _content(0.8, busy=True)})["machine"]["busy"]


def test_runs_on_other_rows_are_not_compared() -> None:
    with pytest.raises(HfcompressError, match=r"one and two differ in task\.dataset, task\.split"):
        join_reports({"one": _content(0.8), "two": _content(0.8, dataset="other", split="dev")})


def test_seeds_of_one_recipe_have_a_mean_and_a_deviation() -> None:
    contents = {str(n): _content(score) for n, score in enumerate((0.8, 0.82, 0.84))}
    assert describe_seeds(contents) == "accuracy of 3 runs of one recipe: 0.8200 ± 0.0200 (mean ± sd)."
    assert describe_seeds({**contents, "other": _content(0.8, name="other")}) == ""


def test_the_report_command_takes_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(_content(0.8)))
    assert factories.run_cli("report", tmp_path / "one", tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "2 runs" in said
    assert "accuracy of 2 runs of one recipe: 0.8000 ± 0.0000" in said
    assert factories.run_cli("report", tmp_path / "one", tmp_path / "two", "--measure") == 2
