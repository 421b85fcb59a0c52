"""`measure: {seeds: …}`: the models are made once for each seed, and the report tells mean and deviation."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hfcompress.measure.seeds import list_seeds, parse_seeds
from hfcompress.recipe.loader import load
from hfcompress.report.seeds import add_seeds
from hfcompress.run import runner, seeds
from hfcompress.run.directory import open_finished
from tests import factories

TRAIN = {"epochs": 1, "batch_size": 32, "learning_rate": 1e-3}
STAGES = [
    {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"], "train": TRAIN},
    {"kind": "quantize", "backend": "float16"},
]
LATENCY = {"latency": {"batch_sizes": [1], "rounds": 1, "rows": 8, "threads": 1}, "bootstrap": 100}


@pytest.mark.parametrize(("value", "own", "found"), [(None, 5, [5]), (3, 5, [5, 6, 7]), ([1, 5, 2], 5, [5, 1, 2])])
def test_the_recipes_own_seed_comes_first(value: Any, own: int, found: list[int]) -> None:
    assert list_seeds(parse_seeds(value), own) == found


@pytest.mark.parametrize(
    ("value", "message"),
    [(1, "1 seeds: there are between 2 and 20"), ([1], "1 seeds: there are between"), ("3", "a whole number"),
     (True, "a whole number"), ([1, 1], "stands twice"), ([1, -1], "lies between 0 and"), (21, "21 seeds")],
)  # fmt: skip
def test_what_are_no_seeds_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_seeds(value)


def test_check_finds_seeds_without_the_recipes_own(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli("check", recipe, "--set", "measure.seeds=[1, 2]") == 2
    said = capsys.readouterr().err
    assert "[1, 2] lacks the recipe's seed, 42" in said
    assert "set `seed: 1`" in said
    assert factories.run_cli("check", recipe, "--set", "measure.seeds=2", "--set", "seed=4294967295") == 2
    assert "would be larger than" in capsys.readouterr().err


@dataclass
class Seeded:
    """A run with two seeds, and what was trained and measured since."""

    recipe: Path
    directory: Path
    trained: list[str]
    scored: list[int]

    def run(self, *sets: str, **options: Any) -> dict[str, Any]:
        self.trained.clear()
        self.scored.clear()
        done = runner.run(load(self.recipe, list(sets)), self.directory, **options)
        assert done is not None
        return done.report


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Any:
    from tests.in_process import in_this_process

    folder = tmp_path_factory.mktemp("seeds")
    hub, measure = {"license": "apache-2.0"}, LATENCY | {"seeds": [42, 7]}
    recipe = factories.recipe(folder / "r.yaml", teacher, data, stages=STAGES, hub=hub, measure=measure)
    trained, scored = list[str](), list[int]()
    run_stage, score_models = runner._run_stage, seeds.score_models

    def note_stage(name: str, *arguments: Any) -> Any:
        trained.append(f"{arguments[2].seed} {name}")
        return run_stage(name, *arguments)

    def note_scores(models: Any, *arguments: Any) -> Any:
        scored.append(len(models))
        return score_models(models, *arguments)

    with pytest.MonkeyPatch.context() as patch, in_this_process(), factories.machine_state():
        patch.setattr(runner, "_run_stage", note_stage)
        patch.setattr(seeds, "score_models", note_scores)
        made = Seeded(recipe, folder / "run", trained, scored)
        made.run()
        yield made


def test_each_seed_makes_its_own_models_and_the_report_tells_both(seeded: Seeded) -> None:
    report = json.loads((seeded.directory / "report.json").read_text())
    other = seeded.directory / "seeds" / "7"
    assert {path.name for path in other.iterdir()} == {
        "recipe.yaml", "recipe.lock.json", "scores.json", "01-distill", "02-quantize",
    }  # fmt: skip
    scores = json.loads((other / "scores.json").read_text())["scores"]
    source, *rows = report["rows"]
    assert "seeds" not in source  # no stage trains it
    for row in rows:
        found = row["seeds"]
        assert found["seeds"] == [42, 7]
        assert found["values"] == [row["quality"]["accuracy"], scores[row["stage"]]]
        assert found["mean"] == pytest.approx(sum(found["values"]) / 2)
        assert found["change"]["mean"] == pytest.approx(found["mean"] - source["quality"]["accuracy"])
    ours, theirs = (path / "01-distill" / "model.safetensors" for path in (seeded.directory, other))
    assert ours.read_bytes() != theirs.read_bytes()


def test_a_source_that_is_trained_has_seeds_and_is_paired_with_its_model(
    tmp_path: Path, teacher: Path, data: Path
) -> None:
    stages = [{"kind": "finetune", "train": TRAIN}, STAGES[1]]
    recipe = load(factories.recipe(tmp_path / "r.yaml", teacher, data, stages=stages)).recipe
    rows = [factories.report_row("source", quality=0.9), factories.report_row("02-quantize", quality=0.8)]
    scores = {43: {"source": 0.7, "02-quantize": 0.65}}

    source, result = add_seeds({"rows": rows}, recipe, scores)["rows"]

    assert (source["seeds"]["values"], source["seeds"].get("change")) == ([0.9, 0.7], None)
    assert result["seeds"]["values"] == [0.8, 0.65]
    assert result["seeds"]["change"]["mean"] == pytest.approx(-0.075)


def test_card_and_tables_tell_the_spread(seeded: Seeded) -> None:
    card = (seeded.directory / "final" / "README.md").read_text(encoding="utf-8")
    assert "| Accuracy of 2 seeds, mean ± standard deviation |" in card
    assert "2 seeds" in (seeded.directory / "report.md").read_text(encoding="utf-8")
    rows = list(csv.DictReader((seeded.directory / "report.csv").open()))
    assert [row["seeds"] for row in rows] == ["0", "2", "2"]
    assert float(rows[2]["seeds_mean"]) > 0


def test_the_recipe_of_another_seed_makes_the_same_models_alone(seeded: Seeded) -> None:
    other = seeded.directory / "seeds" / "7"
    overrides = json.loads((other / "recipe.lock.json").read_text())["overrides"]
    loaded = load(other / "recipe.yaml", overrides)
    assert (loaded.recipe.seed, loaded.recipe.measure.seeds) == (7, None)
    seeded.trained.clear()
    runner.make_models(loaded, other)
    assert seeded.trained == []


def test_the_same_command_again_makes_and_measures_nothing(seeded: Seeded) -> None:
    before = (seeded.directory / "report.json").read_bytes()
    seeded.run()
    assert (seeded.trained, seeded.scored) == ([], [])
    assert (seeded.directory / "report.json").read_bytes() == before


def test_a_killed_seed_goes_on_where_it_was(seeded: Seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    other = seeded.directory / "seeds" / "7"
    shutil.rmtree(other / "02-quantize")
    (other / "scores.json").unlink()
    report = seeded.run()
    assert (seeded.trained, seeded.scored) == (["7 02-quantize"], [3])
    assert open_finished(seeded.directory)[1] == report


def test_other_seeds_change_no_time_and_leave_with_the_option(seeded: Seeded) -> None:
    before = json.loads((seeded.directory / "report.json").read_text())
    report = seeded.run("measure.seeds=null")
    assert seeded.trained == []
    assert not any("seeds" in row for row in report["rows"])
    assert [row["latency"] for row in report["rows"]] == [row["latency"] for row in before["rows"]]
    assert seeded.run("measure.seeds=[42, 7]")["rows"] == before["rows"]
    assert seeded.trained == []


def test_a_part_of_the_chain_is_made_with_one_seed(seeded: Seeded) -> None:
    report = seeded.run("measure.seeds=[42, 7, 8]", only="distill")
    assert not any("seeds" in row for row in report["rows"])
    assert not (seeded.directory / "seeds" / "8").exists()
