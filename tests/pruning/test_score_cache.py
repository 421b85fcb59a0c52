"""Scores are computed once for all budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from hfcompress.context import StageContext
from hfcompress.data.sequence import TextClassification
from hfcompress.data.source import cache_home
from hfcompress.models.artifact import open_artifact
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.criteria.obs import Obs
from hfcompress.pruning.score_cache import find_scores
from hfcompress.pruning.stage import Prune
from hfcompress.pruning.state import PruningRun, start_run


def start(teacher: Path, data: Path, folder: Path, **options: object) -> PruningRun:
    task = TextClassification(dataset=str(data), text=["sentence"], max_length=16)
    parent = open_artifact(teacher)
    context = StageContext(task, 1, parent, {}, folder)
    stage = Prune.model_validate({"criterion": {"use": "obs", "rows": 32}, "budget": {"macs": 0.5}, **options})
    assert parent.shape is not None
    return start_run(stage, parent.shape, parent, context)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFCOMPRESS_HOME", str(tmp_path / "cache"))


def count(run: PruningRun) -> tuple[Scores, int]:
    with mock.patch.object(Obs, "scores", autospec=True, side_effect=Obs.scores) as scores:
        return find_scores(run, run.load_parent()), scores.call_count


def test_another_budget_reads_the_same_scores_to_the_bit(teacher: Path, data: Path, tmp_path: Path) -> None:
    first, computed = count(start(teacher, data, tmp_path))
    again, read = count(start(teacher, data, tmp_path, budget={"macs": 0.25}))
    assert (computed, read) == (1, 0)
    for kind in ("heads", "neurons"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(first, kind), getattr(again, kind), strict=True))


@pytest.mark.parametrize("other", [{"criterion": Obs(rows=16)}, {"layers": 1}])
def test_other_rows_or_a_model_that_was_cut_are_scored_anew(
    teacher: Path, data: Path, tmp_path: Path, other: dict[str, object]
) -> None:
    count(start(teacher, data, tmp_path))
    run = start(teacher, data, tmp_path)
    assert count(replace(run, options=run.options.model_copy(update=other)))[1] == 1


def test_a_damaged_file_is_computed_again(teacher: Path, data: Path, tmp_path: Path) -> None:
    count(start(teacher, data, tmp_path))
    (file,) = (cache_home() / "scores").glob("*.safetensors")
    file.write_bytes(b"no scores")
    assert count(start(teacher, data, tmp_path))[1] == 1
