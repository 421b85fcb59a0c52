"""Data in which a class is rare: whether a teacher is better than chance, and how much each class counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hfcompress.data.class_weights import weigh_classes
from hfcompress.data.fill_mask import FillMask
from hfcompress.data.metrics import object_array
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.task import IGNORED, token_loss
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.losses.hard_labels import HardLabels
from hfcompress.distillation.teacher_quality import require_better_than_chance
from hfcompress.distillation.teachers import Member
from hfcompress.finetuning.stage import Finetune
from hfcompress.models.artifact import load_tokenizer
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.training import trainer as training
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.distillation.test_teachers import one_stage, ran

CLASSES = {"ham": 0, "spam": 1}


def rare(path: Path, rows: int = 200, every: int = 50) -> Path:
    """Rows of which one in `every` is spam, told by a good word."""
    path.mkdir()
    for split in ("train", "dev"):
        lines = ["sentence\tlabel"]
        for number in range(rows):
            spam = number % every == 0
            words = [factories.NEUTRAL[(number + i) % len(factories.NEUTRAL)] for i in range(4)] + [
                "good" if spam else "film"
            ]
            lines.append(f"{' '.join(words)}\t{'spam' if spam else 'ham'}")
        (path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def oracle(path: Path) -> Path:
    """A model that says spam where a text has a good word and ham elsewhere."""
    model = factories.model("bert", layers=1, num_labels=2, id2label={0: "ham", 1: "spam"}, label2id=CLASSES)
    tokenizer = factories.tokenizer()
    rows = [" ".join([*factories.NEUTRAL[:4], word]) for word in ("good", "film")]
    batch = tokenizer(rows * 8, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(60):
        model(**batch, labels=torch.tensor([1, 0] * 8)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return factories.save(model.eval(), path)


def constant(path: Path) -> Path:
    """A model that always says ham."""
    model = factories.model("bert", layers=1, num_labels=2, id2label={0: "ham", 1: "spam"}, label2id=CLASSES)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    return factories.save(model, path)


# ---- chance


def test_a_perfect_teacher_of_a_rare_class_teaches(tmp_path: Path) -> None:
    """196 of 200 rows are ham: always saying that is 2 points below a teacher that is never wrong."""
    data = rare(tmp_path / "data")
    note = ran(one_stage(tmp_path / "r.yaml", oracle(tmp_path / "oracle"), data), tmp_path / "run")
    assert note["teacher"]["dev"] == 1.0


def test_a_teacher_that_always_says_the_same_is_refused_with_ways_out(tmp_path: Path) -> None:
    data = rare(tmp_path / "data")
    with pytest.raises(
        HfcompressError, match=r"is at chance: its accuracy on the dev split is 0.9800, .* without the texts is 0.9800"
    ) as e:
        ran(one_stage(tmp_path / "r.yaml", constant(tmp_path / "always"), data), tmp_path / "run")
    told = e.value.problems[0].fix
    assert "put a `finetune` stage first" in told
    assert "98.0% of the rows are of one class: `metric: matthews_correlation` or `f1` tells more" in told
    assert "class_weights: balanced" in told


def test_a_source_at_chance_after_its_finetune_stage_is_told_as_that(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = constant(tmp_path / "base")
    stages = [
        {"kind": "finetune", "train": {"max_steps": 1, "learning_rate": 1e-9}},
        {"kind": "distill", "student": {"layers": 1}, "losses": ["soft_labels"]},
    ]
    recipe = factories.recipe(tmp_path / "r.yaml", base, data, stages=stages)
    assert factories.run_cli("run", recipe, "--output", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "the stage 01-finetune did not teach it: train longer" in told
    assert "put a `finetune` stage first" not in told


@pytest.mark.parametrize(
    ("task", "right", "chance", "references"),
    [
        (Regression, np.linspace(0, 1, 40), np.full(40, 0.5), np.linspace(0, 1, 40)),
        (QuestionAnswering, object_array(["film"] * 9 + [""]), object_array([""] * 10), object_array([["film"]] * 10)),
        (FillMask, np.array([[2.0, 0.5]] * 9), np.array([[0.4, 3.0]] * 9), np.full(9, 2.0)),
    ],
)
def test_the_gain_over_chance_is_told_for_every_metric(task: Any, right: Any, chance: Any, references: Any) -> None:
    """Of a metric of which less is better, too."""
    kinds = {Regression: "regression", QuestionAnswering: "question-answering", FillMask: "fill-mask"}
    columns = {"text": ["a", "b"]} if task is QuestionAnswering else {"text": ["a"]}
    for metric in task.metrics:
        made = task(type=kinds[task], dataset="org/name", metric=metric, **columns)
        assert made.gain(right, chance, references) > 0, metric
        assert made.gain(chance, right, references) < 0, metric
        assert made.gain(chance, chance, references) == 0, metric


def test_a_small_difference_on_few_rows_is_no_difference() -> None:
    task = TextClassification(type="text-classification", dataset="org/name", text=["a"])
    references = np.array([0, 1] * 10)
    near = np.array([0, 1] * 6 + [0, 0] * 4)
    assert task.score(near, references) > task.score(task.answer_blindly(references, None), references)  # type: ignore[arg-type]
    few = task.gain(near[:4], np.zeros(4, int), references[:4])
    many = task.gain(np.tile(near, 20), np.zeros(400, int), np.tile(references, 20))
    assert few <= 0 < many


def test_the_best_blind_class_is_the_one_that_the_metric_likes() -> None:
    """F1 of class 1 is 0 where class 0 is always said."""
    references = np.array([0] * 9 + [1])
    for metric, expected in (("accuracy", 0), ("f1", 1)):
        task = TextClassification(type="text-classification", dataset="org/name", text=["a"], metric=metric)
        assert set(task.answer_blindly(references, None).tolist()) == {expected}  # type: ignore[arg-type]


def test_a_teacher_that_is_examined_says_its_score(tmp_path: Path) -> None:
    data, place = rare(tmp_path / "data"), oracle(tmp_path / "oracle")
    task = TextClassification(type="text-classification", dataset=str(data), text=["sentence"], max_length=16)
    from hfcompress.models.artifact import load_model

    words = load_tokenizer(place)
    member = Member("source", load_model(place, task.auto_class), words)
    assert require_better_than_chance(member, task.encode(task.read("dev"), words, CLASSES), task, made_by=None) == 1.0


# ---- class weights


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 90 + [1] * 9 + [2]
    n, classes = len(labels), 3
    expected = [n / (classes * labels.count(c)) for c in range(classes)]  # compute_class_weight's definition
    found = weigh_classes("balanced", {"labels": labels}, {"a": 0, "b": 1, "c": 2})  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == pytest.approx(expected)
    assert sum(found[label] for label in labels) == pytest.approx(n)


def test_tags_are_counted_where_they_stand() -> None:
    rows = {"labels": [[IGNORED, 0, 0, IGNORED], [0, 1, IGNORED]]}
    found = weigh_classes("balanced", rows, {"O": 0, "B-PER": 1, "B-LOC": 2})  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1), 1.0])


def test_a_mapping_weighs_the_classes_that_it_names() -> None:
    found = weigh_classes({"spam": 20.0}, {"labels": [0, 1]}, CLASSES)  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == [1.0, 20.0]
    with pytest.raises(HfcompressError, match="no class 'span' to weigh") as error:
        weigh_classes({"span": 2.0}, {"labels": [0, 1]}, CLASSES)  # type: ignore[arg-type]
    assert "did you mean 'spam'" in error.value.problems[0].fix


def test_the_weighted_loss_is_torchs_weighted_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 3, generator=draw), torch.tensor([0, 0, 1, 2, 0, 1])
    weights = torch.tensor([0.5, 2.0, 7.0])
    task = TextClassification(type="text-classification", dataset="org/name", text=["a"])
    expected = F.cross_entropy(logits, labels, weight=weights)
    assert torch.equal(task.loss(logits, labels, None, weights), expected)
    by_hand = -(weights[labels] * logits.log_softmax(-1)[range(6), labels]).sum() / weights[labels].sum()
    assert torch.allclose(expected, by_hand)
    tags = torch.tensor([[0, IGNORED, 1], [2, 0, IGNORED]])
    spread = torch.randn(2, 3, 3, generator=draw)
    found = token_loss(spread, tags, weights)
    assert torch.allclose(found, F.cross_entropy(spread.flatten(0, 1), tags.flatten(), weight=weights))
    assert token_loss(spread, torch.full((2, 3), IGNORED), weights) == 0


@pytest.mark.parametrize("weights", ["balanced", {"spam": 25.0}])
def test_a_stage_trains_with_the_weights_of_its_rows(tmp_path: Path, weights: Any) -> None:
    data = rare(tmp_path / "data")
    task = TextClassification(type="text-classification", dataset=str(data), text=["sentence"], max_length=16)
    rows = task.encode(task.read("train"), factories.tokenizer(), CLASSES)
    loss = HardLabels(class_weights=weights)
    state = loss.state_of(rows, CLASSES)
    assert state is not None
    objective = Objective(factories.model().eval(), [loss], task, states=[state])
    batch = task.batch([rows[i] for i in (0, 1, 2, 50)], factories.tokenizer())
    batch.pop("index")
    logits = objective.student(batch["input_ids"], batch["attention_mask"]).logits
    expected = F.cross_entropy(logits, batch["labels"], weight=state)
    assert torch.allclose(objective(**batch)["loss"], expected)
    assert not [name for name in objective.state_dict() if "state_of" in name]


def test_a_step_that_is_split_is_one_weighted_mean(tmp_path: Path) -> None:
    """A batch of rare rows counts as much as their weights do, however a step is split."""
    task = TextClassification(type="text-classification", dataset="org/name", text=["a"])
    weights, loss = torch.tensor([1.0, 20.0]), HardLabels(class_weights={"spam": 20.0})
    objective = Objective(factories.model(), [loss], task, states=[weights])
    batch = {**factories.batch(6), "labels": torch.tensor([0, 1, 0, 0, 0, 1])}
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
    units = torch.stack([objective.units(part)[0] for part in parts])
    assert units.tolist() == [1.0, 43.0]
    with torch.no_grad():
        means = torch.stack([objective.eval()(**part)["loss"] for part in parts])
        whole = objective(**batch)["loss"]
    assert torch.allclose((units * means).sum() / units.sum(), whole, atol=1e-5)


def test_a_finetune_stage_and_hard_labels_take_class_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rare(tmp_path / "data")
    seen: list[Any] = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda objective, *a, **k: seen.append(objective) or train(objective, *a, **k)
    )
    short: Any = {"max_steps": 2, "batch_size": 8}
    stages = [
        {"kind": "finetune", "class_weights": "balanced", "train": short},
        {"kind": "distill", "losses": [{"use": "hard_labels", "class_weights": {"spam": 3}}], "train": short},
    ]
    ran(factories.recipe(tmp_path / "r.yaml", oracle(tmp_path / "base"), data, stages=stages), tmp_path / "run")
    buffers = [dict(objective.named_buffers(recurse=False))["state_of_hard_labels"].tolist() for objective in seen]
    assert buffers == [pytest.approx([200 / (2 * 196), 200 / (2 * 4)]), [1.0, 3.0]]


@pytest.mark.parametrize(
    ("value", "why"),
    [("even", "`balanced` or a mapping"), ({}, "`balanced` or a mapping"), ({"a": 0}, "number above 0"),
     ({"a": True}, "number above 0"), ({True: 2.0}, "put it in quotes")],
)  # fmt: skip
def test_class_weights_that_mean_nothing_are_refused(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Finetune.model_validate({"kind": "finetune", "class_weights": value})


def test_numbers_are_class_names_too() -> None:
    stage = Finetune.model_validate({"kind": "finetune", "class_weights": {0: 1, 1: 99.0}})
    assert stage.class_weights == {"0": 1.0, "1": 99.0}


def test_tasks_without_classes_have_none_to_weigh() -> None:
    stage = Finetune(kind="finetune", class_weights="balanced", train=Train())
    (found,) = stage.problems(None, {}, SimpleNamespace(type="regression", is_streamed=False))  # type: ignore[arg-type]
    assert (found.message, found.key) == ("a regression task has no classes to weigh", ("class_weights",))
    (found,) = LOSSES.parse({"use": "hard_labels", "class_weights": "balanced"}).task_problems(
        SimpleNamespace(type="fill-mask")
    )
    assert "a fill-mask task has no classes" in found.message


def test_a_class_that_is_not_there_is_told_before_the_run(tmp_path: Path) -> None:
    data = rare(tmp_path / "data")
    stages = [
        {"kind": "finetune", "class_weights": {"span": 2.0}},
        {"kind": "distill", "losses": [{"use": "hard_labels", "class_weights": {"hm": 2.0}}]},
    ]
    recipe = factories.recipe(tmp_path / "r.yaml", oracle(tmp_path / "base"), data, stages=stages)
    with pytest.raises(HfcompressError) as error:
        check(load(recipe))
    assert [(p.message, p.fix) for p in error.value.problems] == [
        ("there is no class 'span' to weigh", "did you mean 'spam'?"),
        ("there is no class 'hm' to weigh", "did you mean 'ham'?"),
    ]
