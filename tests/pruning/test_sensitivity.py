"""The metric of a model of which one layer's attention or FFN alone is short of units."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.artifact import load_model, load_tokenizer
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.sensitivity import make_gate, measure_sensitivity
from hfcompress.recipe.loader import load
from hfcompress.training.evaluate import score
from tests import factories


class Task:
    """Only the metric's name matters here."""

    metric_name = "total"


def drawn(*counts: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator) for count in counts]


def total(model: Any, rows: Any, tokenizer: Any, task: Any) -> float:
    """A metric that every change of the model changes."""
    with torch.no_grad():
        return float(model(**factories.batch()).logits.double().square().sum())


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_it_is_the_metric_of_the_model_without_the_least_units_of_one_block(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcompress.training.evaluate.score", total)
    model = factories.model(family)
    scores = Scores(drawn(4, 4), drawn(64, 64, seed=2))

    found = measure_sensitivity(model, scores, range(7), None, Task, [0.25, 0.5, 1.0], group=8)

    assert {key: found[key] for key in ("metric", "split", "rows", "shares")} == {
        "metric": "total", "split": "dev", "rows": 7, "shares": [0.25, 0.5, 1.0],
    }  # fmt: skip
    assert found["whole"] == pytest.approx(total(model, None, None, None), rel=1e-9)
    for block, width, units in (("heads", 8, scores.heads), ("ffn", 1, scores.neurons)):
        for layer, values in enumerate(units):
            order = sorted(range(len(values)), key=lambda i: float(values[i]))
            for share, metric in zip([0.25, 0.5, 1.0], found[block][layer], strict=True):
                gone = order[: round(share * len(order))]
                assert metric == pytest.approx(without(model, block, layer, width, gone), rel=1e-5)


def without(model: Any, block: str, layer: int, width: int, gone: list[int]) -> float:
    """The same metric, of a copy whose next linear layer has zeros in the columns of these units."""
    other = deepcopy(model)
    modules = spec_of(other).modules
    path = modules.attention_output if block == "heads" else modules.ffn_out
    weight = layers_of(other)[layer].get_submodule(path).weight
    with torch.no_grad():
        for unit in gone:
            weight[:, unit * width : (unit + 1) * width] = 0
    return total(other, None, None, None)


def test_neurons_go_in_whole_groups_and_the_best_stay() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8, 0.2, 0.7, 0.6])

    assert make_gate(scores, 0.4, 1).tolist() == [0, 1, 1, 0, 1, 0, 1, 1]
    assert make_gate(scores, 0.4, 4).tolist() == [0, 1, 0, 0, 1, 0, 1, 1]
    assert make_gate(scores, 1.0, 4).tolist() == [0] * 8
    assert make_gate(torch.zeros(0), 0.5, 1).tolist() == []


def test_a_teacher_s_curves_and_the_teacher_after_them(
    recipe: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load(recipe).recipe.task
    model, tokenizer = load_model(teacher, task.auto_class), load_tokenizer(teacher)
    rows = task.encode(task.read("dev"), tokenizer, dict(model.config.label2id))
    before = score(model, rows, tokenizer, task)
    scores = Scores(drawn(4, 4), drawn(64, 64))

    found = measure_sensitivity(model, scores, rows, tokenizer, task, [0.01, 1.0])

    assert (found["metric"], found["rows"], found["whole"]) == (task.metric, len(rows), before)
    assert all(layer[0] == before for layer in found["heads"]), "a hundredth of four heads is none"
    assert min(layer[1] for block in ("heads", "ffn") for layer in found[block]) < before
    assert score(model, rows, tokenizer, task) == before, "no gate is left on the model"
    assert f"sensitivity of 2 layers: 9 evaluations of {len(rows)} dev rows" in capsys.readouterr().err
