"""`hfcompress search` on a tiny model: the winner, its recipe, exit codes, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hfcompress.measure.timing import time_models
from hfcompress.models.artifact import weights_hash
from hfcompress.recipe.yaml_text import dump_yaml
from tests.factories import model, run_cli, save, write_data

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("in_process")


def write(path: Path, teacher: Path, data: Path, **keys: Any) -> Path:
    content = {
        "name": "tiny",
        "model": str(teacher),
        "task": {
            "type": "text-classification", "dataset": str(data), "text": ["sentence"], "metric": "accuracy",
            "max_length": 16,
        },
        "search": {"max_drop": 0.3, "hours": 1},
        "measure": {"latency": {"batch_sizes": [2], "rows": 8, "threads": 1, "cold_starts": 0}, "plain_runtime": False},
        "hub": {"license": "apache-2.0"},
        **keys,
    }  # fmt: skip
    path.write_text(dump_yaml(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    """The run directory of a finished search."""
    from tests.in_process import in_this_process

    folder = tmp_path_factory.mktemp("found")
    with in_this_process():
        assert run_cli("search", write(folder / "r.yaml", teacher, data), "-o", folder / "run") == 0
    return folder / "run"


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "search" / "search.json").read_text(encoding="utf-8"))


def test_the_winner_lies_in_final_with_its_report_and_card(found: Path) -> None:
    content = read(found)
    best = content["trials"][content["best"] - 1]
    assert best["holds"]
    assert (found / "final" / "README.md").is_file()
    assert content["done"]
    rows = json.loads((found / "report.json").read_text(encoding="utf-8"))["rows"]
    assert rows[-1]["disk_bytes"] == best["bytes"]


def test_the_plain_recipe_makes_the_same_model(found: Path, tmp_path: Path) -> None:
    recipe = found / "recipe.yaml"
    assert "search" not in recipe.read_text(encoding="utf-8")
    assert run_cli("run", recipe, "-o", tmp_path / "again") == 0
    assert weights_hash(tmp_path / "again" / "final") == weights_hash(found / "final")


def test_the_recipe_of_a_trial_on_the_front_makes_its_model(found: Path, tmp_path: Path) -> None:
    trial = next(trial for trial in read(found)["trials"] if trial["recipe"])
    assert run_cli("run", found / "search" / trial["recipe"], "-o", tmp_path / "again") == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"][-1]["disk_bytes"] == trial["bytes"]


def test_the_same_command_again_tries_nothing(found: Path, teacher: Path, data: Path, capsys: Capture) -> None:
    before = read(found)
    assert run_cli("search", found.parent / "r.yaml", "-o", found) == 0
    assert "trying" not in capsys.readouterr().err
    after = read(found)
    assert (after["trials"], after["best"]) == (before["trials"], before["best"])


def test_nothing_keeps_to_the_limits(tmp_path: Path, teacher: Path, data: Path, capsys: Capture) -> None:
    recipe = write(tmp_path / "r.yaml", teacher, data, search={"max_drop": 0.3, "hours": 0.0001, "min_speedup": 999})
    assert run_cli("search", recipe, "-o", tmp_path / "run") == 3
    assert "nearest attempt" in capsys.readouterr().err
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    content = read(tmp_path / "run")
    assert (content["best"], content["chosen"], content["done"]) == (None, 1, False)
    assert "not 999x faster" in " ".join(content["trials"][0]["faults"])


def refused(capsys: Capture, *arguments: object) -> str:
    assert run_cli(*arguments) == 2
    return capsys.readouterr().err


def test_fill_mask_is_not_searched(tmp_path: Path, teacher: Path, data: Path, capsys: Capture) -> None:
    task = {"type": "fill-mask", "dataset": str(data), "text": ["sentence"], "max_length": 16}
    said = refused(capsys, "search", write(tmp_path / "r.yaml", teacher, data, task=task), "-o", tmp_path / "run")
    assert "is judged on blocks of several rows" in said


def test_compress_does_not_use_the_recipe_of_another_model(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / f"{data.name}.yaml", tmp_path / "another", data)
    assert f"is a recipe for {tmp_path / 'another'}, not for {teacher}" in refused(capsys, "compress", teacher, data)


def test_a_grid_of_lengths_does_not_replace_the_times_of_the_rows(tmp_path: Path, teacher: Path, data: Path) -> None:
    latency = {"batch_sizes": [2], "rows": 8, "threads": 1, "cold_starts": 0, "lengths": [8, 16]}
    measure = {"latency": latency, "plain_runtime": False}
    recipe = write(tmp_path / "r.yaml", teacher, data, search={"max_drop": 0.3, "hours": 0.0001}, measure=measure)
    with mock.patch("hfcompress.searching.workshop.time_models", wraps=time_models) as timed:
        assert run_cli("search", recipe, "-o", tmp_path / "run") == 0
    assert [call.args[2].lengths for call in timed.call_args_list] == [[]]


def test_a_source_at_chance_is_refused(tmp_path: Path, data: Path, capsys: Capture) -> None:
    untrained = save(model(), tmp_path / "model")
    said = refused(capsys, "search", write(tmp_path / "r.yaml", untrained, data), "-o", tmp_path / "run")
    assert "the source is at chance: its accuracy on the dev split is" in said
    assert "the difference is not above 0 with 95% certainty" in said


def test_a_small_dev_split_is_told(tmp_path: Path, teacher: Path, data: Path, capsys: Capture) -> None:
    recipe = write(tmp_path / "r.yaml", teacher, data)
    run_cli("search", recipe, "--max-drop", "1%", "--hours", "0.0001", "-o", tmp_path / "run")
    said = capsys.readouterr().err
    assert "48 rows of dev can rule out a loss above" in said
    assert "`task.dev_rows` takes more rows from train" in said


@pytest.mark.parametrize(
    ("search", "why"),
    [
        ({"backends": ["onnx_int9"]}, "no backend 'onnx_int9'"),
        ({"hours": 0}, "search.hours"),
        ({"goal": "beauty"}, "search.goal"),
        ({"max_drop": 2}, "search.max_drop"),
        ({"speed": 3}, "search.speed"),
    ],
)
def test_mistakes(tmp_path: Path, teacher: Path, data: Path, capsys: Capture, search: dict[str, Any], why: str) -> None:
    assert why in refused(capsys, "search", write(tmp_path / "r.yaml", teacher, data, search=search))


def test_a_recipe_without_stages_is_for_search_alone(
    tmp_path: Path, teacher: Path, data: Path, capsys: Capture
) -> None:
    recipe = write(tmp_path / "r.yaml", teacher, data)
    assert "`hfcompress search" in refused(capsys, "run", recipe)
    recipe = write(tmp_path / "s.yaml", teacher, data, search=None)
    assert "at least one stage" in refused(capsys, "run", recipe)


def test_a_storage_that_cannot_be_opened(tmp_path: Path, teacher: Path, data: Path, capsys: Capture) -> None:
    recipe = write(tmp_path / "r.yaml", teacher, data)
    url = f"sqlite:///{tmp_path}/none/trials.db"
    assert "cannot be read" in refused(capsys, "search", recipe, "-o", tmp_path / "run", "--storage", url)


def test_rows_move_from_train_to_dev(tmp_path: Path) -> None:
    from hfcompress.data.sequence import TextClassification

    data = write_data(tmp_path / "data", {"train": 60, "dev": 10, "test": 10})
    plain = TextClassification(dataset=str(data), text=["sentence"])
    moved = plain.model_copy(update={"dev_rows": 25})
    assert [len(moved.read(split)) for split in ("train", "dev", "test")] == [45, 25, 10]
    texts = sorted(moved.read("train")["sentence"][:] + moved.read("dev")["sentence"][:])
    assert texts == sorted(plain.read("train")["sentence"][:] + plain.read("dev")["sentence"][:])
    assert plain.model_copy(update={"dev_rows": 5}).read("dev")["sentence"][:] == plain.read("dev")["sentence"][:]


@pytest.mark.slow
def test_compress_needs_no_recipe(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ("compress", teacher, data, "--max-drop", "0.3", "--hours", "0.0001", "-o", tmp_path / "run")
    assert run_cli(*command) == 0
    assert (tmp_path / "run" / "final" / "README.md").is_file()
    assert (tmp_path / f"{data.name}.yaml").is_file()
    assert run_cli(*command) == 0
    assert "is there, and is used" in capsys.readouterr().err


def test_the_python_function(tmp_path: Path, teacher: Path, data: Path) -> None:
    import hfcompress as hfc

    task = hfc.TextClassification(dataset=str(data), text=["sentence"], max_length=16)
    measure = hfc.Measure(latency=hfc.Latency(batch_sizes=[2], rows=8, threads=1, cold_starts=0), plain_runtime=False)
    output = tmp_path / "run"
    best = hfc.search(teacher, task=task, max_drop=0.3, hours=0.0001, measure=measure, output=output)
    assert best.found
    assert best.run.model_directory == output / "final"
    assert "onnx_int8" in best.recipe
    assert best.trials["best"] == 1
