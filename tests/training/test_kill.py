"""A stage that is killed in the middle says in the end what an uninterrupted one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfcompress.context import StageContext
from hfcompress.models.artifact import open_artifact
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.training import trainer as training
from tests import factories

TRAIN = {"max_steps": 2, "batch_size": 16, "checkpoint_steps": 1}
WORDS = {"vocabulary": "corpus", "embedding_rank": 8}
SEEN = {"sensitivity": {"shares": [0.5], "rows": 16}, "tune": "scales"}
CUT = {"kind": "prune", "criterion": {"use": "taylor", "rows": 32}, "ffn": 0.25, "heads": 0.25}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Killed(BaseException):
    """No handler of the toolkit's runs, as after SIGKILL."""


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A fine-tuned model with words that no row has."""
    words = [
        *factories.WORDS,
        "unheard",
        *(x for x in LETTERS if x not in factories.WORDS),
        *(f"##{x}" for x in LETTERS),
    ]
    return factories.fine_tuned(tmp_path_factory.mktemp("wordy"), data, words=words, vocab_size=len(words))


def noted(recipe: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, kill: int | None = None) -> tuple[Any, int]:
    """Runs a recipe's only stage; killed before a training where its number is said.

    The context is new after a kill: nothing that was in memory is left.

    Returns:
        The facts about the stage, and how many trainings there were.
    """
    loaded = load(recipe)
    source = open_artifact(Path(loaded.recipe.model))
    (directory / "01.partial").mkdir(parents=True, exist_ok=True)
    context = StageContext(loaded.recipe.task, 0, source, {"model": source}, directory / "01.partial")
    count, train = 0, training.train

    def counted(*arguments: Any, **named: Any) -> float:
        nonlocal count
        count += 1
        if count == kill:
            raise Killed
        return train(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", counted)
        try:
            result = loaded.recipe.stages[0].run(source, context)
        except Killed:
            return None, count
    return result.facts, count


@pytest.mark.parametrize(
    "stage",
    [
        {**CUT, **SEEN, **WORDS, "recover": TRAIN},
        {**CUT, **SEEN, **WORDS, "criterion": "random", "layers": 1, "schedule": {"use": "iterative", "rounds": 2},
         "recover": TRAIN},
        {**CUT, **WORDS, "schedule": {"use": "lottery", "rounds": 1, "rewind_steps": 1}, "train": TRAIN},
        {**CUT, **WORDS, "schedule": "gradual", "train": TRAIN, "recover": TRAIN},
        {"kind": "distill", "student": {"hidden": 16, "width": "activation", "rows": 16, "vocabulary": "corpus"},
         "losses": ["soft_labels"], "train": TRAIN},
        {"kind": "quantize", "backend": {"use": "onnx_int8", "mode": "static"}, "train": TRAIN},
    ],
    ids=["one_shot", "iterative", "lottery", "gradual", "distill", "quantization-aware"],
)  # fmt: skip
def test_a_killed_stage_notes_what_an_uninterrupted_one_does(
    tmp_path: Path, wordy: Path, data: Path, stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each of its trainings in turn: everything that comes before it is kept by then."""
    recipe = factories.recipe(tmp_path / "r.yaml", wordy, data, stages=[stage])
    check(load(recipe))
    expected, trainings = noted(recipe, tmp_path / "whole", monkeypatch)
    if stage["kind"] == "prune":
        assert {"vocabulary", "embedding_rank", "kept"} <= expected.keys()
        assert not SEEN.keys() <= stage.keys() or {"sensitivity", "tuned"} <= expected.keys()
    for number in range(1, trainings + 1):
        directory = tmp_path / f"killed-{number}"
        assert noted(recipe, directory, monkeypatch, kill=number)[0] is None
        found, again = noted(recipe, directory, monkeypatch)
        assert again <= trainings
        assert found == expected, number
