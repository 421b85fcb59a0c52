"""Every distillation loss against its published formula, written out as loops."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.base.shape import Layer, Shape, shape_of
from hfcompress.data.task import Regression, TextClassification
from hfcompress.losses.base import LOSSES, Loss, Step
from hfcompress.model.observe import Observed, observe
from hfcompress.stages.distill import teaching_problems, uniform_map
from hfcompress.stages.train import Train
from hfcompress.stages.training import CompressionTrainer, Objective, training_arguments
from tests import world

LENGTHS = (7, 4, 1)
CLASSES = TextClassification(type="text-classification", dataset="none", text=["sentence"])
SCORES = Regression(type="regression", dataset="none", text=["sentence"])


def loss(name: str, **options: Any) -> Loss:
    return LOSSES.parse({"use": name, **options})


def shape(hidden: int = 8, layers: int = 2, heads: int = 2, labels: int = 3) -> Shape:
    return Shape("bert", (Layer(heads, 16),) * layers, hidden, hidden // heads, 20, 16, 2, labels)


def observed(hidden: int = 8, layers: int = 2, heads: int = 2, labels: int = 3, seed: int = 0) -> Observed:
    """A forward pass with random tensors at real and padded places alike."""
    torch.manual_seed(seed)
    rows, length = len(LENGTHS), max(LENGTHS)
    return Observed(
        torch.randn(rows, labels, requires_grad=True),
        tuple(torch.randn(rows, length, hidden, requires_grad=True) for _ in range(layers + 1)),
        *(
            tuple(torch.randn(rows, heads, length, hidden // heads, requires_grad=True) for _ in range(layers))
            for _ in range(2)
        ),
    )


def step(student: Observed, teacher: Observed | None, labels: Tensor | None = None, task: Any = CLASSES) -> Step:
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    depth = uniform_map(len(student.keys), len(teacher.keys)) if teacher else []
    return Step(student, teacher, mask, labels, tuple(depth), task)


def value(term: Loss, seen: Step, learned: Any = None) -> float:
    return term.compute(seen, learned).item()


def repadded(seen: Observed, value: float) -> Observed:
    """The same pass with another value at every padded place."""

    def fill(tensor: Tensor, axis: int) -> Tensor:
        tensor = tensor.detach().clone()
        for row, length in enumerate(LENGTHS):
            tensor[row].narrow(axis, length, max(LENGTHS) - length).fill_(value)
        return tensor

    return Observed(
        seen.logits,
        tuple(fill(t, 0) for t in seen.hidden_states),
        tuple(fill(t, 1) for t in seen.queries),
        tuple(fill(t, 1) for t in seen.keys),
    )


def widened(seen: Observed, more: int) -> Observed:
    """The same pass in a batch that is padded further."""

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, more), value=3.0)

    return Observed(seen.logits, *(tuple(map(pad, some)) for some in (seen.hidden_states, seen.queries, seen.keys)))


def mean_square(student: Tensor, teacher: Tensor) -> float:
    """MSE over the real tokens of the batch, number by number: `(rows, length, width)` tensors."""
    total, count = 0.0, 0
    for row, length in enumerate(LENGTHS):
        for token in range(length):
            for a, b in zip(student[row, token].tolist(), teacher[row, token].tolist(), strict=True):
                total, count = total + (a - b) ** 2, count + 1
    return total / count


def attention_of_head(seen: Observed, layer: int, row: int, head: int) -> list[float]:
    """`Q Kᵀ / √d_k` of one head over all pairs of one row's real tokens."""
    queries, keys = seen.queries[layer][row, head].tolist(), seen.keys[layer][row, head].tolist()
    real = range(LENGTHS[row])
    dot = [[sum(a * b for a, b in zip(queries[i], keys[j], strict=True)) for j in real] for i in real]
    return [product / math.sqrt(len(keys[0])) for products in dot for product in products]


# The formulas


@pytest.mark.parametrize(("hidden", "depth"), [(8, 2), (8, 4), (12, 4)])
def test_hidden_states_follow_tinybert_equation_8(hidden: int, depth: int) -> None:
    student, teacher = observed(), observed(hidden, depth, seed=1)
    term = loss("hidden_states")
    learned: Any = term.learned(shape(), shape(hidden, depth))
    expected = 0.0
    for m, g in enumerate(uniform_map(2, depth), start=1):
        mapped = student.hidden_states[m] if learned is None else student.hidden_states[m] @ learned[0].weight.T
        expected += mean_square(mapped, teacher.hidden_states[g])
    assert (learned is None) == (hidden == 8)
    assert value(term, step(student, teacher), learned) == pytest.approx(expected, rel=1e-5)


def test_embeddings_follow_tinybert_equation_9() -> None:
    for hidden in (8, 12):
        student, teacher, term = observed(), observed(hidden, seed=1), loss("embeddings")
        learned: Any = term.learned(shape(), shape(hidden))
        mapped = student.hidden_states[0] if learned is None else student.hidden_states[0] @ learned.weight.T
        expected = mean_square(mapped, teacher.hidden_states[0])
        assert value(term, step(student, teacher), learned) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("hidden", "depth"), [(8, 2), (16, 4)])
def test_attention_scores_follow_tinybert_equation_7(hidden: int, depth: int) -> None:
    student, teacher = observed(), observed(hidden, depth, seed=1)
    expected = 0.0
    for m, g in enumerate(uniform_map(2, depth)):
        for head in range(2):
            squares, count = 0.0, 0
            for row in range(len(LENGTHS)):
                ours, theirs = (attention_of_head(s, x, row, head) for s, x in ((student, m), (teacher, g - 1)))
                squares += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True))
                count += LENGTHS[row] ** 2
            expected += squares / count / 2
    assert value(loss("attention_scores"), step(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("squared", [True, False])
def test_soft_labels_follow_hinton(temperature: float, squared: bool) -> None:
    student, teacher = observed(), observed(seed=1)

    def softened(row: list[float]) -> list[float]:
        powers = [math.exp(z / temperature) for z in row]
        return [power / sum(powers) for power in powers]

    expected = 0.0
    for ours, theirs in zip(student.logits.tolist(), teacher.logits.tolist(), strict=True):
        expected += sum(p * math.log(p / q) for p, q in zip(softened(theirs), softened(ours), strict=True))
    expected *= (temperature**2 if squared else 1) / len(LENGTHS)
    term = loss("soft_labels", temperature=temperature, squared_temperature=squared)
    assert value(term, step(student, teacher)) == pytest.approx(expected, rel=1e-4)


def test_the_squared_temperature_keeps_the_size_of_the_gradient() -> None:
    def slope(**options: Any) -> float:
        student, teacher = observed(), observed(seed=1)
        loss("soft_labels", **options).compute(step(student, teacher), None).backward()
        assert student.logits.grad is not None
        return float(student.logits.grad.norm())

    hot, hotter = slope(temperature=20.0), slope(temperature=200.0)
    assert hotter == pytest.approx(hot, rel=0.1)
    assert slope(temperature=200.0, squared_temperature=False) == pytest.approx(hotter / 200**2, rel=1e-3)


def test_soft_labels_of_one_output_are_the_squared_difference() -> None:
    student, teacher = observed(labels=1), observed(labels=1, seed=1)
    pairs = zip(student.logits.flatten().tolist(), teacher.logits.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / len(LENGTHS)
    assert value(loss("soft_labels", temperature=4.0), step(student, teacher, task=SCORES)) == pytest.approx(
        expected, rel=1e-5
    )


def test_hard_labels_are_the_task_s_own_loss() -> None:
    student, labels = observed(), torch.tensor([2, 0, 1])
    rows = zip(student.logits.tolist(), labels.tolist(), strict=True)
    logarithms = [math.log(sum(map(math.exp, row))) - row[label] for row, label in rows]
    term = loss("hard_labels")
    assert not term.needs_teacher
    assert value(term, step(student, None, labels)) == pytest.approx(sum(logarithms) / 3, rel=1e-5)

    one, scores = observed(labels=1), torch.tensor([0.5, -1.0, 2.0])
    squares = [(z - y) ** 2 for z, y in zip(one.logits.flatten().tolist(), scores.tolist(), strict=True)]
    assert value(term, step(one, None, scores, SCORES)) == pytest.approx(sum(squares) / 3, rel=1e-5)


# Padding


@pytest.mark.parametrize("name", ["embeddings", "hidden_states", "attention_scores"])
def test_padding_does_not_change_the_value(name: str) -> None:
    student, teacher, term = observed(), observed(seed=1), loss(name)
    expected = value(term, step(student, teacher))
    for junk in (0.0, 1e3):
        assert value(term, step(repadded(student, junk), repadded(teacher, -junk))) == pytest.approx(expected)
    wide = step(widened(student, 5), widened(teacher, 5))
    wide = replace(wide, mask=torch.nn.functional.pad(wide.mask, (0, 5)))
    assert value(term, wide) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["embeddings", "hidden_states", "attention_scores"])
def test_padding_gets_no_gradient(name: str) -> None:
    student = observed()
    loss(name).compute(step(student, observed(seed=1)), None).backward()
    tensors = [t for some in (student.hidden_states, student.queries, student.keys) for t in some if t.grad is not None]
    assert tensors
    for gradient in (t.grad for t in tensors):
        assert float(gradient[0].abs().max()) > 0
        assert float(gradient[1, ..., LENGTHS[1] :, :].abs().max()) == 0


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("name", ["embeddings", "hidden_states", "attention_scores", "soft_labels"])
def test_a_padded_batch_of_a_model_gives_what_its_rows_give_alone(name: str, family: str) -> None:
    """The mean over the batch's entries is the mean of the rows' means, each by its number of entries."""
    objective, teacher = objective_of(family, [loss(name)])
    batch = world.batch()
    together = value_of(objective, teacher, batch)
    total, count = 0.0, 0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        entries = {"attention_scores": length**2, "soft_labels": 1}.get(name, length)
        total, count = total + value_of(objective, teacher, alone) * entries, count + entries
    assert together == pytest.approx(total / count, rel=1e-4)


def objective_of(family: str, losses: list[Loss], **student: Any) -> tuple[Objective, Any]:
    teacher = world.model(family, layers=4, seed=1)
    # Dropout would make the two passes differ.
    pupil = world.model(family, **student, **dropless(family))
    return Objective(pupil, losses, CLASSES, teacher, uniform_map(2, 4)).train(), teacher


def dropless(family: str) -> dict[str, float]:
    if family == "distilbert":
        return {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trainer_of(objective: Objective, teacher: Any, folder: Path) -> CompressionTrainer:
    arguments = training_arguments(Train(), folder, 0, 8, "accuracy")
    return CompressionTrainer(objective, arguments, teacher=teacher)


def value_of(objective: Objective, teacher: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(objective(teacher=observe(teacher, batch, objective.needs), **batch)["loss"])


# Gradients and weights


def test_gradients_reach_student_and_projections_and_never_the_teacher(tmp_path: Path) -> None:
    losses = [loss("embeddings"), loss("hidden_states"), loss("soft_labels")]
    objective, teacher = objective_of("bert", losses, hidden=16)
    trainer = trainer_of(objective, teacher, tmp_path)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    trainer.compute_loss(objective, {**world.batch(), "labels": torch.tensor([0, 1, 0, 1])}).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached >= {"learned.embeddings.weight", "learned.hidden_states.0.weight", "student.classifier.weight"}
    # A key's bias shifts a query's scores all alike, which the softmax does not see.
    idle = {name for name, _ in objective.named_parameters()} - reached
    assert all(name.endswith("self.key.bias") or "token_type" in name for name in idle)


def test_each_layer_can_have_its_own_projection() -> None:
    student, teacher = observed(), observed(12, seed=1)
    shapes = shape(), shape(12)
    shared: Any = loss("hidden_states").learned(*shapes)
    own: Any = loss("hidden_states", projection="per_layer").learned(*shapes)
    assert (len(shared), len(own)) == (1, 2)
    assert tuple(own[0].weight.shape) == (12, 8)
    term = loss("hidden_states", projection="per_layer")
    expected = sum(
        mean_square(student.hidden_states[m] @ own[m - 1].weight.T, teacher.hidden_states[m]) for m in (1, 2)
    )
    assert value(term, step(student, teacher), own) == pytest.approx(expected, rel=1e-5)
    assert loss("hidden_states", projection="per_layer").learned(shape(), shape()) is None


def test_a_weight_scales_its_loss_in_the_sum() -> None:
    parts = [loss("hidden_states", weight=0.5), loss("attention_scores", weight=3.0), loss("soft_labels", weight=0.0)]
    objective, teacher = objective_of("bert", parts)
    batch = world.batch()
    hidden, scores = (
        value_of(objective_of("bert", [loss(name)])[0], teacher, batch)
        for name in ("hidden_states", "attention_scores")
    )
    assert value_of(objective, teacher, batch) == pytest.approx(0.5 * hidden + 3.0 * scores, rel=1e-5)


def test_identical_models_have_nothing_to_learn() -> None:
    teacher = world.model(layers=2, **dropless("bert"))
    names = ("embeddings", "hidden_states", "attention_scores", "soft_labels")
    objective = Objective(teacher, [loss(name) for name in names], CLASSES, teacher, [1, 2]).train()
    assert value_of(objective, teacher, world.batch()) == pytest.approx(0, abs=1e-6)


# What cannot be compared


def test_attention_scores_refuse_differing_heads() -> None:
    found = loss("attention_scores").problems(shape(heads=2), shape(heads=4))
    assert len(found) == 1
    assert "2, 4 heads" in found[0]
    assert "use hidden_states" in found[0]
    uneven = replace(shape(), layers=(Layer(2, 16), Layer(1, 16)))
    assert "1, 2 heads" in loss("attention_scores").problems(uneven, shape())[0]
    assert loss("attention_scores").problems(shape(hidden=8), shape(hidden=16, layers=4)) == []


def test_soft_labels_refuse_differing_heads_of_the_task() -> None:
    found = loss("soft_labels").problems(shape(labels=2), shape(labels=3))
    assert found == ["the student has 2 labels and the teacher 3"]


def test_a_teacher_of_another_vocabulary_or_fewer_layers_is_refused() -> None:
    losses = [loss("hidden_states")]
    other = replace(shape(), vocab=21)
    assert "vocabulary has 20 entries and the teacher's 21" in teaching_problems(shape(), other, losses)[0].message
    assert "2 layers and the teacher 1" in teaching_problems(shape(), shape(layers=1), losses)[0].message
    assert teaching_problems(shape(), shape(layers=1), [loss("soft_labels")]) == []


@pytest.mark.parametrize(
    ("name", "option", "given"),
    [("soft_labels", "temperature", 0.0), ("soft_labels", "weight", -1.0), ("hidden_states", "projection", "none")],
)
def test_options_out_of_range_are_refused(name: str, option: str, given: Any) -> None:
    with pytest.raises(ValueError, match=option):
        loss(name, **{option: given})


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_names_its_source_and_gives_a_finite_scalar(name: str) -> None:
    term = loss(name)
    found = term.compute(step(observed(), observed(seed=1), torch.tensor([0, 1, 2])), None)
    assert found.shape == ()
    assert bool(found.isfinite())
    assert term.source
    assert term.problems(shape_of(world.model().config.to_dict()), shape_of(world.model().config.to_dict())) == []
