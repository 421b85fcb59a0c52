"""Reports of several runs in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.report.seeds import describe_row, describe_seeds, group_by_seed, read_recipe
from hfcompress.report.side_by_side import join_reports
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import hash_json
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


def _write_run(folder: Path, seed: int, quality: float, busy: bool = False, **recipe: Any) -> Path:
    """Writes the files of a run that tell its seed and its scores."""
    folder.mkdir()
    held = {"name": "mine", "seed": seed, "stages": ["…"], "measure": {"seeds": None}, **recipe}
    (folder / "recipe.lock.json").write_text(json.dumps({"recipe": held}))
    (folder / "report.json").write_text(json.dumps({**_content(quality, busy=busy), "recipe": hash_json(held)}))
    return folder


def test_runs_that_differ_in_the_seed_alone_have_a_mean_and_a_test(tmp_path: Path, capsys: Any) -> None:
    runs = [_write_run(tmp_path / f"s{seed}", seed, 0.8 + seed / 50) for seed in (1, 2, 0)]
    other = _write_run(tmp_path / "other", 3, 0.2, stages=["another"])

    assert factories.run_cli("report", *runs, other) == 0

    said = capsys.readouterr().out
    assert "3 seeds (0, 1, 2): mean ± standard deviation" in said
    assert "0.9000 ±" not in said  # no stage trains the source
    assert "0.8200 ± 0.0200" in said
    assert "-0.0800 (-0.1297 to -0.0303)" in said  # 0.02 / √3 times 4.303, the quantile of t with 2 degrees of freedom
    assert "worse" in said
    assert "s1" in said
    assert "other" in said


def test_other_options_other_reports_and_equal_seeds_make_no_group(tmp_path: Path) -> None:
    runs = {
        "one": _write_run(tmp_path / "one", 1, 0.8),
        "again": _write_run(tmp_path / "again", 1, 0.8),
        "named": _write_run(tmp_path / "named", 2, 0.8, name="a", measure={"seeds": [1, 2]}),
        "unlike": _write_run(tmp_path / "unlike", 3, 0.8, measure={"bootstrap": 500}),
        "stale": _write_run(tmp_path / "stale", 4, 0.8),
    }
    (tmp_path / "stale" / "recipe.lock.json").write_text(json.dumps({"recipe": {"seed": 9}}))
    contents = {name: json.loads((run / "report.json").read_text()) for name, run in runs.items()}
    recipes = {name: read_recipe(run, contents[name]) for name, run in runs.items()}

    (group,) = group_by_seed(contents, recipes)

    assert recipes["stale"] is None
    assert list(group.reports) == [1, 2]
    assert group.stages == ["source", "02-quantize"]


def test_the_seeds_of_a_row_are_told_in_a_sentence() -> None:
    row = {"seeds": describe_row([1, 2], [0.9, 0.9], [0.8, 0.8], lower_is_better=False)}
    assert describe_seeds(row) == (
        "2 seeds score 0.8000 ± 0.0000 (mean ± standard deviation), a mean change of -0.1000, the same with each seed."
    )
    row = {"seeds": describe_row([1, 2], [0.9, 0.9], [0.8, 0.9], lower_is_better=False)}
    assert "a mean change of -0.0500 (-0.6853 to +0.5853), within noise (paired t-test over seeds)." in describe_seeds(
        row
    )
    assert describe_seeds({}) == ""


def test_the_report_command_takes_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(_content(0.8)))
    assert factories.run_cli("report", tmp_path / "one", tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "2 runs" in said
    assert "seeds" not in said  # these are no runs: no recipe tells that they differ in the seed alone
    assert factories.run_cli("report", tmp_path / "one", tmp_path / "two", "--measure") == 2


def test_the_comparison_of_several_runs_is_written_as_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, quality in (("one", 0.8), ("two", 0.7)):
        (tmp_path / name).mkdir()
        of_a_run = {"key": "0", "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None}}
        (tmp_path / name / "report.json").write_text(json.dumps(_content(quality) | of_a_run))
    runs = (tmp_path / "one", tmp_path / "two")
    assert factories.run_cli("report", *runs, "--output", tmp_path / "both") == 0
    assert str(tmp_path / "both" / "report.html") in capsys.readouterr().out
    page = (tmp_path / "both" / "report.html").read_text()
    assert "What each model saves" in page  # these are not the stages of one run
    assert [row["stage"] for row in json.loads((tmp_path / "both" / "report.json").read_text())["rows"]][1:] == [
        "one", "two",
    ]  # fmt: skip
    assert factories.run_cli("report", tmp_path / "one", "--output", tmp_path / "both") == 2
    (tmp_path / "two" / "recipe.lock.json").write_text("{}")
    assert factories.run_cli("report", *runs, "--output", tmp_path / "two") == 2
