"""The one training path: what it computes, what it resumes from, whom it learns from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hfcompress.context import StageContext
from hfcompress.data.fill_mask import FillMask
from hfcompress.distillation.losses.hard_labels import HardLabels
from hfcompress.distillation.teachers import TeacherEnsemble
from hfcompress.models.artifact import open_artifact
from hfcompress.recipe.loader import load
from hfcompress.training import checkpoints
from hfcompress.training import trainer as training
from hfcompress.training.arguments import make_arguments
from hfcompress.training.batches import Collator, make_batches
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train
from hfcompress.utils.errors import HfcompressError
from tests import factories, masked

TRAIN = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "logging_steps": 1}  # 6 steps
NARROW = {"layers": 1, "hidden": 16, "ffn": 32}
Weights = dict[str, torch.Tensor]


class Watch(TrainerCallback):
    """Writes down what a training run shows."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.modes: set[bool] = set()
        self.steps = 0
        self.weights: Weights = {}
        self.at_evaluation: list[Weights] = []
        self.objective: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps += 1
        self.objective = model
        self.modes |= {module.training for module in model.student.modules()}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.at_evaluation.append(_copied(model))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights = _copied(model)


def _copied(model: Any) -> Weights:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def watch() -> Watch:
    return Watch()


@dataclass
class Distilled:
    """What one distill stage did.

    Attributes:
        context: Where it ran.
        facts: What it found.
    """

    context: StageContext
    facts: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.context, name)


Distil = Callable[..., Distilled]


@pytest.fixture
def distil(tmp_path: Path, teacher: Path, data: Path, watch: Watch) -> Distil:
    """Runs one distill stage in a folder; the same folder goes on with what is there."""

    def run(
        folder: str = "stage", source: Path = teacher, parent: Path | None = None, more: Any = (), **options: Any
    ) -> Distilled:
        stage = {"kind": "distill", "losses": ["soft_labels"], "student": NARROW, "train": TRAIN} | options
        recipe = load(factories.recipe(tmp_path / "recipe.yaml", source, data, stages=[stage])).recipe
        context = StageContext(recipe.task, recipe.seed, open_artifact(source), {}, tmp_path / folder, [watch, *more])
        result = recipe.stages[0].run(open_artifact(parent or source), context)
        return Distilled(context, result.facts)

    return run


def _equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Resuming


@pytest.mark.parametrize("grouping", [True, False])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    distil: Distil, watch: Watch, tmp_path: Path, grouping: bool
) -> None:
    options = {
        "losses": ["hidden_states", "soft_labels"],
        "train": TRAIN | {"epochs": 2, "checkpoint_steps": 4, "length_grouping": grouping},
    }
    distil("whole", **options)
    whole = watch.weights
    assert any("learned" in name for name in whole)  # the projection is trained, so it has to be resumed too

    with pytest.raises(KeyboardInterrupt):
        distil("parts", more=[masked.Interrupt(10)], **options)
    folder = tmp_path / "parts" / "checkpoints"
    assert checkpoints.find_last_checkpoint(folder) == folder / "checkpoint-8"
    (folder / "checkpoint-12").mkdir()  # one that was being written when the power went
    watch.steps = 0
    distil("parts", **options)
    assert watch.steps == 12 - 8
    assert _equal(watch.weights, whole)


def test_a_checkpoint_holds_a_tied_weight_once_and_gives_it_back(tmp_path: Path, data: Path) -> None:
    """A mask head's weights are the embeddings': safetensors refuses a tensor with two names."""
    from safetensors.torch import load_file, save_file

    task = FillMask(type="fill-mask", dataset=str(data), text=["sentence"])
    objectives = [Objective(factories.model(head="mask", seed=seed), [HardLabels()], task) for seed in (0, 1)]
    save_file(objectives[0].state_dict(), tmp_path / "model.safetensors")
    objectives[1].load_state_dict(load_file(tmp_path / "model.safetensors"))
    own, other = (dict(o.student.named_parameters(remove_duplicate=False)) for o in objectives)
    assert _equal(own, other)
    decoder, table = (
        other[name] for name in ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    )
    assert decoder is table


def checkpoint(folder: Path, step: int, best: str | None = None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": best}))
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(f"{name} of step {step}".encode())
    checkpoints.seal(path)
    return path


def test_the_newest_checkpoint_is_the_last_that_is_whole(tmp_path: Path) -> None:
    assert checkpoints.find_last_checkpoint(tmp_path / "nothing") is None
    for step in (9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("{}")
    assert checkpoints.find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("how", ["missing", "empty", "torn", "changed"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", checkpoints.SEAL],
)
def test_a_checkpoint_with_a_damaged_file_is_passed_over(tmp_path: Path, name: str, how: str) -> None:
    before, damaged = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10) / name
    content = damaged.read_bytes()
    if how == "missing":
        damaged.unlink()
    else:
        left = {"empty": b"", "torn": content[: len(content) // 2], "changed": content[:-3] + b"\0" + content[-2:]}
        damaged.write_bytes(left[how])
    assert checkpoints.find_last_checkpoint(tmp_path) == before


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8, str(best))
    assert checkpoints.find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    (best / "model.safetensors").write_bytes(b"")
    assert checkpoints.find_last_checkpoint(tmp_path) is None


def test_the_best_checkpoint_is_found_again_in_a_directory_that_was_moved(tmp_path: Path) -> None:
    checkpoint(tmp_path / "here", 8, str(checkpoint(tmp_path / "here", 4)))
    (tmp_path / "here").rename(tmp_path / "there")
    last = checkpoints.find_last_checkpoint(tmp_path / "there")
    assert last == tmp_path / "there" / "checkpoint-8"
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "there" / "checkpoint-4")
    assert checkpoints.is_sealed(last)


def test_a_checkpoint_is_not_written_to_a_directory_that_was_removed(distil: Distil, tmp_path: Path) -> None:
    class Remove(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                shutil.rmtree(tmp_path / "gone")

    with pytest.raises(FileNotFoundError, match="the directory of the checkpoints is gone"):
        distil("gone", more=[Remove()], losses=["soft_labels"], train=TRAIN | {"checkpoint_steps": 4})
    assert not (tmp_path / "gone").exists()


def test_the_same_seed_gives_the_same_weights(distil: Distil, watch: Watch) -> None:
    distil("one")
    first = watch.weights
    torch.rand(7)  # what ran before in the process does not matter
    distil("two")
    assert _equal(watch.weights, first)


# The teacher


def test_the_teacher_is_in_eval_mode_and_is_not_trained(
    distil: Distil, watch: Watch, monkeypatch: pytest.MonkeyPatch, teacher: Path
) -> None:
    from safetensors.torch import load_file

    seen: dict[str, Any] = {"modes": set()}
    ask = TeacherEnsemble.ask

    def looked_at(self: Any, *arguments: Any) -> Any:
        observed = ask(self, *arguments)
        seen["teacher"] = self.members[0].model
        seen["modes"] |= {module.training for module in seen["teacher"].modules()}
        seen["grad"] = observed.logits.requires_grad
        return observed

    monkeypatch.setattr(TeacherEnsemble, "ask", looked_at)
    distil(losses=["hidden_states", "soft_labels"])
    assert seen["modes"] == {False}
    assert seen["grad"] is False
    assert all(parameter.grad is None for parameter in seen["teacher"].parameters())
    kept = load_file(teacher / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen["teacher"].state_dict().items())
    assert watch.modes == {True}  # the student's dropout is on


def test_a_teacher_that_was_never_fine_tuned_is_refused(distil: Distil, tmp_path: Path) -> None:
    untrained = factories.save(factories.model(), tmp_path / "untrained")
    with pytest.raises(
        HfcompressError,
        match=r"is at chance: its accuracy on the dev split is 0\.5000, .* without the texts is 0\.5000",
    ):
        distil(source=untrained)


def test_a_teacher_without_its_classifier_is_refused(distil: Distil, tmp_path: Path) -> None:
    headless = factories.save(factories.model().bert, tmp_path / "headless")
    with pytest.raises(HfcompressError, match=r"lacks 2 of the weights .*classifier\.bias, classifier\.weight"):
        distil(source=headless)


def test_a_student_of_labels_alone_asks_no_teacher(distil: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("no loss needs a teacher")

    monkeypatch.setattr("hfcompress.distillation.engine.require_better_than_chance", never)
    assert "teacher" not in distil(losses=["hard_labels"]).facts


# Steps


def test_each_loss_is_logged_and_they_add_up(distil: Distil, watch: Watch) -> None:
    losses = [{"use": "hidden_states", "weight": 0.5}, "soft_labels", {"use": "soft_labels", "temperature": 2.0}]
    distil(losses=losses, train=TRAIN | {"epochs": 3})
    assert len(watch.logs) == 18
    for logs in watch.logs:
        parts = [logs[f"loss_{name}"] for name in ("hidden_states", "soft_labels_1", "soft_labels_2")]
        assert sum(parts) == pytest.approx(logs["loss"], abs=2e-4)
    assert watch.logs[-1]["loss"] < watch.logs[0]["loss"]


def test_two_batches_of_sixteen_are_one_of_thirty_two(distil: Distil, watch: Watch, tmp_path: Path, data: Path) -> None:
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    source = factories.fine_tuned(tmp_path / "calm", data, **calm)
    train = {"epochs": 1, "learning_rate": 1e-3, "logging_steps": 1, "length_grouping": False}
    distil("one", source=source, train=train | {"batch_size": 32})
    logs, weights = watch.logs, watch.weights
    watch.logs = []
    distil("two", source=source, train=train | {"batch_size": 16, "gradient_accumulation": 2})
    assert len(logs) == len(watch.logs) == 3
    for a, b in zip(logs, watch.logs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    for name, tensor in weights.items():
        torch.testing.assert_close(watch.weights[name], tensor, atol=5e-4, rtol=1e-3)


class Gradients(TrainerCallback):
    """Writes down the gradients of each step, before any optimizer sees them."""

    def __init__(self) -> None:
        self.steps: list[Weights] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append(found)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words and tags in rows of 1 to 12 words; 36 rows to train on, so the last step of 32 is not full."""

    def row(draw: Any, number: int) -> dict[str, Any]:
        words = draw.choices(factories.WORDS[5:], k=1 + draw.randrange(12) * (number % 3 > 0))
        return {"tokens": words, "ner_tags": ["B-X" if word in factories.GOOD else "O" for word in words]}

    return factories.write_rows(tmp_path_factory.mktemp("uneven"), row, {"train": 36, "dev": 8})


CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKEN_LOSSES = ["hard_labels", {"use": "soft_labels", "temperature": 2.0}, "hidden_states", "attention_scores",
                "attention_probabilities", "embeddings", "minilm", "cosine"]  # fmt: skip


@pytest.mark.parametrize("grouping", [True, False])
def test_a_step_of_tokens_is_the_same_however_it_is_accumulated(
    tmp_path: Path, uneven: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch, grouping: bool
) -> None:
    monkeypatch.setattr("hfcompress.distillation.engine.require_better_than_chance", lambda *_: 1.0)
    labels = {"id2label": {0: "O", 1: "B-X"}, "label2id": {"O": 0, "B-X": 1}}
    source = factories.save(factories.model(head="token", **labels, **CALM), tmp_path / "source")
    task = {"type": "token-classification", "dataset": str(uneven), "max_length": 32}

    def taken(rows: int, accumulated: int) -> tuple[list[Weights], list[dict[str, float]]]:
        train = {"epochs": 1, "learning_rate": 1e-4, "max_grad_norm": 1e9, "logging_steps": 1, "batch_size": rows,
                 "gradient_accumulation": accumulated, "length_grouping": grouping}  # fmt: skip
        stage = {"kind": "distill", "losses": TOKEN_LOSSES, "student": {"layers": 1}, "train": train}
        recipe = load(factories.recipe(tmp_path / "r.yaml", source, uneven, task=task, stages=[stage])).recipe
        kept, watch.logs = Gradients(), []
        context = StageContext(recipe.task, 0, open_artifact(source), {}, tmp_path / f"{rows}", [watch, kept])
        recipe.stages[0].run(open_artifact(source), context)
        return kept.steps, watch.logs

    steps, logs = taken(32, 1)
    assert len(steps) == len(logs) == 2
    for split in ((8, 4), (2, 16)):
        parts, told = taken(*split)
        for one, other in zip(steps, parts, strict=True):
            assert one.keys() == other.keys()
            assert _distance(one, other) < 1e-3
        for one_log, other_log in zip(logs, told, strict=True):
            for name in (name for name in one_log if name.startswith("loss")):
                assert other_log[name] == pytest.approx(one_log[name], rel=1e-3, abs=2e-4), name


def _distance(one: Weights, other: Weights) -> float:
    """How far two sets of gradients are apart, relative to their size."""
    apart = sum(float((one[name] - other[name]).pow(2).sum()) for name in one)
    return (apart / sum(float(value.pow(2).sum()) for value in one.values())) ** 0.5


def test_masks_ask_as_much_however_a_step_is_accumulated() -> None:
    units, total = torch.tensor([[2.0, 8.0], [6.0, 8.0]]), torch.tensor([16.0, 16.0])
    shares = training.weigh_batches(units, total, batches=4)
    assert shares.tolist() == [[0.5, 2.0], [1.5, 2.0]]

    class Penalty(torch.nn.Module):
        def penalty(self, progress: float) -> torch.Tensor:
            return torch.tensor(3.0)

        def lay_over(self, *_: Any) -> Any:
            return nullcontext()

    task = FillMask(type="fill-mask", dataset="nowhere", text=["sentence"])
    objective = Objective(factories.model(head="mask"), [HardLabels()], task, masks=Penalty())  # type: ignore[arg-type]
    batch = factories.batch()
    whole = objective(labels=batch["input_ids"], **batch)
    half = objective(labels=batch["input_ids"], shares=torch.tensor([0.5]), **batch)
    assert half["parts"]["mask"] == whole["parts"]["mask"] == 3.0
    assert half["parts"]["hard_labels"].item() == pytest.approx(0.5 * whole["parts"]["hard_labels"].item())
    assert half["loss"].item() == pytest.approx(0.5 * whole["parts"]["hard_labels"].item() + 3.0)


def test_keep_best_keeps_the_best_epoch(distil: Distil, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, 0.1, 0.7])
    monkeypatch.setattr("hfcompress.distillation.engine.require_better_than_chance", lambda *_: 1.0)
    monkeypatch.setattr(training, "score", lambda *_, **__: next(scores))
    context = distil(train=TRAIN | {"epochs": 3, "keep_best": True})
    assert context.facts["dev"] == 0.7  # the kept model is judged once more at the end
    _, second, third, kept = watch.at_evaluation
    assert _equal(kept, second)
    assert not _equal(kept, third)


def test_fine_tuning_learns(tmp_path: Path, data: Path) -> None:
    base = factories.save(factories.model().bert, tmp_path / "base")
    train = {"epochs": 15, "batch_size": 16, "learning_rate": 5e-3}
    recipe = load(
        factories.recipe(tmp_path / "r.yaml", base, data, stages=[{"kind": "finetune", "train": train}])
    ).recipe
    context = StageContext(recipe.task, recipe.seed, open_artifact(base), {}, tmp_path / "stage")
    result = recipe.stages[0].run(open_artifact(base), context)
    assert result.facts["dev"] == 1.0


def test_a_second_phase_goes_on_with_the_student_of_the_first(distil: Distil, watch: Watch) -> None:
    first = distil("intermediate", losses=["embeddings", "hidden_states", "attention_scores"], student={"layers": 1})
    made = watch.weights
    second = distil("prediction", parent=first.model_directory, student=None, train=TRAIN | {"epochs": 0})
    assert "student" not in second.facts  # nothing is initialised anew
    after = open_artifact(second.model_directory)
    assert after.shape == open_artifact(first.model_directory).shape
    from safetensors.torch import load_file

    weights = load_file(after.path / "model.safetensors")
    assert all(torch.equal(weights[name], made[f"student.{name}"]) for name in weights)


def test_no_epochs_train_nothing(distil: Distil, watch: Watch) -> None:
    distil(train=TRAIN | {"epochs": 0})
    assert watch.steps == 0


# Batches


@pytest.fixture(scope="module")
def task(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(factories.recipe(tmp_path_factory.mktemp("recipe") / "r.yaml", teacher, data)).recipe.task


@pytest.fixture(scope="module")
def encoded(task: Any) -> Any:
    return task.encode(task.read("train"), factories.tokenizer(), {"LABEL_0": 0, "LABEL_1": 1})


def test_a_batch_is_as_long_as_its_longest_row(encoded: Any, task: Any) -> None:
    rows = [encoded[i] for i in range(4)]
    batch = Collator(task, factories.tokenizer(), None, on_gpu=False)(rows)
    longest = max(row["length"] for row in rows)
    assert batch["input_ids"].shape == (4, longest)
    assert longest < 16  # max_length
    assert batch["attention_mask"].sum(1).tolist() == [row["length"] for row in rows]
    assert batch["labels"].tolist() == [row["labels"] for row in rows]
    assert Collator(task, factories.tokenizer(), None, on_gpu=True)(rows)["input_ids"].shape[1] % 8 == 0


def test_batches_hold_every_row_once_and_rows_of_like_length(encoded: Any, task: Any) -> None:
    batches = list(make_batches(encoded, factories.tokenizer(), task, 16))
    assert sum(len(batch["labels"]) for batch in batches) == len(encoded)
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    assert all(a.max() <= b.min() for a, b in pairwise(lengths))


def test_length_grouping_pads_less(distil: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    padding: list[float] = []
    pad = Collator.__call__

    def counted(self: Any, rows: Any) -> Any:
        batch = pad(self, rows)
        padding.append(float(1 - batch["attention_mask"].float().mean()))
        return batch

    monkeypatch.setattr(Collator, "__call__", counted)
    monkeypatch.setattr(training, "check_first_step", lambda *_: None)
    monkeypatch.setattr("hfcompress.distillation.engine.require_better_than_chance", lambda *_: 1.0)
    means = {}
    for grouping in (True, False):
        padding.clear()
        distil(f"{grouping}", train=TRAIN | {"batch_size": 4, "length_grouping": grouping})
        means[grouping] = sum(padding[:24]) / 24
    assert means[True] < 0.7 * means[False]


def test_every_key_of_a_train_block_arrives(tmp_path: Path) -> None:
    options = Train(
        epochs=2, max_steps=7, learning_rate=3e-4, batch_size=5, gradient_accumulation=3, warmup=0.5, schedule="cosine",
        weight_decay=0.3, max_grad_norm=0.7, precision="bfloat16", keep_best=True, checkpoint_steps=4, logging_steps=9,
        workers=2, report_to=["tensorboard"],
    )  # fmt: skip
    made = make_arguments(options, tmp_path, 11, 100, "mse", greater_is_better=False)
    assert (made.num_train_epochs, made.max_steps, made.learning_rate, made.warmup_steps) == (2, 7, 3e-4, 4)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (5, 3)
    assert (made.lr_scheduler_type, made.weight_decay, made.max_grad_norm) == ("cosine", 0.3, 0.7)
    assert (made.bf16, made.fp16, made.seed, made.logging_steps) == (True, False, 11, 9)
    assert (made.save_strategy, made.save_steps, made.eval_steps, made.load_best_model_at_end) == ("steps", 4, 4, True)
    assert (made.metric_for_best_model, made.greater_is_better) == ("mse", False)
    assert (made.dataloader_num_workers, made.report_to) == (2, ["tensorboard"])
