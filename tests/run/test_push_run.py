"""`push --stage N`, and `hub: {push: true}` at the end of a run, against a Hub on the loopback interface."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hfcompress.run import push as push_
from hfcompress.utils.errors import HfcompressError
from tests import factories, loopback_hub
from tests.in_process import in_this_process
from tests.loopback_hub import LoopbackHub
from tests.run.test_hub import point_at

HALF = {"kind": "quantize", "backend": "float16"}
CHAIN = [{"kind": "prune", "criterion": "magnitude", "ffn": 0.25}, HALF]
MEASURE = {"latency": {"batch_sizes": [1], "rounds": 1, "rows": 4, "threads": 1, "cold_starts": 0}, "bootstrap": 100}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub, which this process asks."""
    with loopback_hub.running() as running:
        point_at(running.url, tmp_path / "cache", monkeypatch)
        yield running


def _write(folder: Path, teacher: Path, data: Path, **hub: Any) -> Path:
    metadata = {"license": "mit", **hub}
    return factories.recipe(folder / "r.yaml", teacher, data, stages=CHAIN, measure=MEASURE, hub=metadata)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with in_this_process(), factories.machine_state():
        recipe = _write(folder, teacher, data, repo="user/from-recipe")
        assert factories.run_cli("run", recipe, "-o", folder / "tiny") == 0
    return folder / "tiny"


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def _sent(hub: LoopbackHub, name: str) -> dict[str, bytes]:
    repo = hub.repositories["model", name]
    return repo.commits[repo.refs["main"]]


@pytest.mark.parametrize("links", [False, True])
def test_the_model_of_a_stage_is_pushed_with_a_card_of_its_own(
    hub: LoopbackHub, finished: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if links:
        monkeypatch.setattr(push_, "SMALL", 20_000)  # the weights are larger
    before = factories.snapshot(finished)
    assert factories.run_cli("push", finished, "--stage", "1", "--repo", "user/pruned") == 0
    sent = _sent(hub, "user/pruned")
    assert sent["model.safetensors"] == (finished / "01-prune" / "model.safetensors").read_bytes()
    assert {"README.md", "recipe.yaml", "config.json", "tokenizer.json", "tradeoff.png"} <= set(sent)
    assert "stage.json" not in sent
    card = ModelCard(sent["README.md"].decode())
    rows = json.loads((finished / "report.json").read_text())["rows"]
    assert card.data.eval_results[0].metric_value == round(rows[1]["quality"]["accuracy"], 6)
    assert "pruned" in card.data.tags
    assert "quantized" not in card.data.tags
    assert 'path = "user/pruned"' in card.content
    assert factories.snapshot(finished) == before
    assert len(hub.asked("/commit/")) == 1


def test_a_card_names_the_repository_that_it_stands_in(hub: LoopbackHub, finished: Path) -> None:
    assert factories.run_cli("push", finished) == 0
    assert b'path = "user/from-recipe"' in _sent(hub, "user/from-recipe")["README.md"]
    assert factories.run_cli("push", finished, "--repo", "user/other") == 0
    card = _sent(hub, "user/other")["README.md"]
    assert b'path = "user/other"' in card
    assert b'user/from-recipe"' not in card, "each snippet names the repository"


def test_a_dry_run_of_a_stage_sends_nothing(
    hub: LoopbackHub, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert factories.run_cli("push", finished, "--stage", "1", "--dry-run") == 0
    assert "model.safetensors" in "".join(capfd.readouterr())
    assert hub.requests == []


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_stage_that_does_not_exist(hub: LoopbackHub, finished: Path, number: int) -> None:
    with pytest.raises(HfcompressError, match=r"the recipe has no such stage\n.*01-prune, 02-quantize"):
        push_.push(finished, "user/tiny", stage=number)
    assert hub.requests == []


def test_a_stage_whose_model_is_not_the_measured_one(hub: LoopbackHub, finished: Path) -> None:
    shutil.copy(finished / "02-quantize" / "model.safetensors", finished / "01-prune" / "model.safetensors")
    with pytest.raises(HfcompressError, match="is not the model that the report is about"):
        push_.push(finished, "user/tiny", stage=1)
    assert hub.requests == []


@pytest.fixture
def pushing(made: Path, tmp_path: Path, teacher: Path, data: Path) -> list[object]:
    """The command of a finished run whose recipe now wants to be pushed."""
    run = Path(shutil.copytree(made, tmp_path / "run"))
    return ["run", _write(tmp_path, teacher, data, repo="user/tiny", push=True), "-o", run]


@pytest.mark.usefixtures("in_process")
def test_a_run_pushes_at_its_end(hub: LoopbackHub, pushing: list[object], capfd: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli(*pushing) == 0
    commit = hub.repositories["model", "user/tiny"].refs["main"]
    assert f"pushed {hub.url}/user/tiny/commit/{commit}" in "".join(capfd.readouterr()).replace("\n", "")
    assert {"model.safetensors", "README.md"} <= set(_sent(hub, "user/tiny"))
    assert factories.run_cli(*pushing) == 0
    assert len(hub.repositories["model", "user/tiny"].commits) == 1


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("place", "fault"), [("/api/repos/create", "403"), ("/commit/", "500"), ("PUT /lfs/", "cut"),
                                              ("/commit/", "an empty object")])  # fmt: skip
def test_a_push_that_fails_loses_no_run(
    hub: LoopbackHub, pushing: list[object], capfd: pytest.CaptureFixture[str], place: str, fault: str
) -> None:
    hub.faults[place] = fault
    run = Path(str(pushing[-1]))
    assert factories.run_cli(*pushing) == 1
    said = " ".join("".join(capfd.readouterr()).split())
    assert "the run is finished, but not published" in said
    assert f"`hfcompresspush{run}`" in said.replace(" ", "")
    assert "Traceback" not in said
    assert (run / "final" / "README.md").is_file()
    assert not hub.repositories or not hub.repositories["model", "user/tiny"].commits
    hub.faults.clear()
    assert factories.run_cli("push", run) == 0
    assert "model.safetensors" in _sent(hub, "user/tiny")


@pytest.mark.usefixtures("in_process")
def test_a_part_of_a_recipe_is_not_pushed(hub: LoopbackHub, pushing: list[object]) -> None:
    assert factories.run_cli(*pushing, "--only", "prune") == 0
    assert hub.requests == []
    assert factories.run_cli(*pushing, "--only", "quantize") == 0
    assert "model.safetensors" in _sent(hub, "user/tiny")
