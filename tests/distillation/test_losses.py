"""Every distillation loss against its published formula, value and gradient, and what all of them have in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hfcompress.distillation.losses import base
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.distillation.losses.hidden_states import align_layers
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.forward import Observation, observe
from hfcompress.models.shape import Layer, Shape
from hfcompress.training.loss import Loss, Ramp, Step, Units
from tests import factories, literal
from tests.seen import LENGTHS, loss, observed, part, repadded, shape, step, task, tensors, token_labels, widened

UNIFORM = ((1, 2), (2, 4))


@dataclass(frozen=True)
class Case:
    """A loss with options, between a student of width 8 and a teacher, and the formula it should follow."""

    name: str
    formula: Callable[[Step, Any], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    hidden: int = 8
    layers: int = 4
    labels: int = 3
    head: str = "sequence"
    labelled: bool = False
    dynamic: bool = False

    @property
    def term(self) -> Loss:
        return loss(self.name, **self.options)

    def step(self) -> Step:
        student = observed(labels=self.labels, head=self.head)
        teacher = observed(self.hidden, self.layers, labels=self.labels, seed=1, head=self.head)
        labels = token_labels() if self.labelled else None
        return step(student, teacher, UNIFORM, self.head, labels, self.dynamic)

    def make_projection(self) -> Any:
        torch.manual_seed(0)
        return self.term.make_projection(shape(), shape(self.hidden, self.layers))

    def __str__(self) -> str:
        said = [f"{k}={v}" for k, v in self.options.items()]
        return " ".join([self.name, self.head, *said, "dynamic" * self.dynamic, f"to {self.hidden}"])


CASES = [
    Case("embeddings", literal.embeddings),
    Case("embeddings", literal.embeddings, hidden=12),
    Case("hidden_states", literal.hidden_states),
    Case("hidden_states", literal.hidden_states, hidden=12),
    Case("hidden_states", literal.hidden_states, {"projection": "per_layer"}, hidden=12),
    Case("hidden_states", literal.hidden_cosines, {"distance": "cosine"}),
    Case("hidden_states", literal.hidden_cosines, {"distance": "cosine"}, hidden=12),
    Case("hidden_states", literal.aligned, hidden=12, dynamic=True),
    Case("hidden_states", partial(literal.aligned, distance=literal.angle), {"distance": "cosine"}, dynamic=True),
    Case("attention_scores", literal.attention_scores),
    Case("attention_scores", literal.attention_scores, hidden=12),
    Case("attention_probabilities", literal.attention_probabilities),
    Case("attention_probabilities", literal.attention_probability_squares, {"distance": "mse"}, hidden=12),
    Case("minilm", literal.minilm, hidden=12),
    Case("minilm", partial(literal.minilm, g=3), {"teacher_layer": 3}),
    Case("minilm_v2", literal.minilm_v2, hidden=12),
    Case("minilm_v2", partial(literal.minilm_v2, heads=4), {"relation_heads": 4}, hidden=12),
    Case("minilm_v2", partial(literal.minilm_v2, heads=1), {"relation_heads": 1}),
    Case(
        "minilm_v2",
        partial(literal.minilm_v2, g=2, alphas=(0.5, 0.0, 3.0)),
        {"teacher_layer": 2, "queries": 0.5, "keys": 0.0, "values": 3.0},
    ),
    Case("cosine", literal.cosine),
    Case("pkd", literal.pkd),
    Case("pkd", literal.pkd, hidden=12),
    Case("rkd", literal.rkd, hidden=12),
    Case("rkd", partial(literal.rkd, of="mean"), {"of": "mean"}),
    Case("rkd", partial(literal.rkd, weights=(25.0, 0.0)), {"distance_weight": 25.0, "angle_weight": 0.0}),
    *(
        Case("soft_labels", formula, options, head=head, labelled=head == "token")
        for head in ("sequence", "token", "mask", "span")
        for options, formula in (
            ({}, literal.soft_labels),
            ({"temperature": 4.0}, partial(literal.soft_labels, t=4.0)),
            (
                {"temperature": 0.5, "squared_temperature": False},
                partial(literal.soft_labels, t=0.5, squared=False),
            ),
            ({"loss": "cross_entropy"}, partial(literal.soft_labels, of="cross_entropy")),
            ({"loss": "mse"}, literal.logit_squares),
        )
    ),
    Case("soft_labels", literal.logit_squares, {"temperature": 4.0}, labels=1),
    Case("soft_labels", literal.soft_labels, head="token"),
    Case("soft_labels", literal.soft_labels, head="mask", labelled=True),
    Case("soft_labels", partial(literal.soft_labels, masked_only=True), {"masked_only": True}, head="mask",
         labelled=True),
]  # fmt: skip
IN_PARTS = ["minilm", "minilm_v2", "attention_probabilities", "soft_labels"]
"""Losses that take a large batch in parts."""
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def value(term: Loss, seen: Step, learned: Any = None) -> float:
    return term.compute(seen, learned).item()


def slopes(found: Tensor, seen: Step, learned: Any) -> dict[str, Tensor]:
    """The gradient of every tensor of the student, and of what is learned, that the loss reaches."""
    inputs = tensors(seen.student)
    if learned is not None:
        inputs |= {f"learned {name}": parameter for name, parameter in learned.named_parameters()}
    gradients = torch.autograd.grad(found, list(inputs.values()), allow_unused=True)
    return {name: g for name, g in zip(inputs, gradients, strict=True) if g is not None and g.abs().max() > 0}


def agree(found: Tensor, expected: Tensor, seen: Step, learned: Any = None) -> None:
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = slopes(found, seen, learned), slopes(expected, seen, learned)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert float((gradient - theirs[name]).norm()) <= 1e-4 * float(theirs[name].norm()), name


# The formulas


@EVERY
def test_value_and_gradient_follow_the_formula(case: Case) -> None:
    seen, learned = case.step(), case.make_projection()
    agree(case.term.compute(seen, learned), case.formula(seen, learned), seen, learned)


def test_every_loss_is_held_to_a_formula() -> None:
    assert {case.name for case in CASES} | {"hard_labels"} == set(LOSSES.names())


def test_hard_labels_are_the_task_s_own_loss() -> None:
    term, labels = loss("hard_labels"), torch.tensor([2, 0, 1, 1])
    seen = step(observed(), None, labels=labels)
    assert not term.needs_teacher
    assert value(term, seen) == pytest.approx(nn.functional.cross_entropy(seen.student.logits, labels).item())


def test_the_squared_temperature_keeps_the_size_of_the_gradient() -> None:
    def slope(**options: Any) -> float:
        seen = step(observed(), observed(seed=1))
        return float(slopes(loss("soft_labels", **options).compute(seen, None), seen, None)["logits"].norm())

    hot, hotter = slope(temperature=20.0), slope(temperature=200.0)
    assert hotter == pytest.approx(hot, rel=0.1)
    assert slope(temperature=200.0, squared_temperature=False) == pytest.approx(hotter / 200**2, rel=1e-3)


def test_a_token_head_without_a_label_in_the_batch_has_nothing_to_learn() -> None:
    seen = step(observed(head="token"), observed(seed=1, head="token"), head="token")
    seen = replace(seen, labels=torch.full_like(seen.mask, -100, dtype=torch.long))
    assert value(loss("soft_labels"), seen) == 0


def test_pkd_of_the_last_layer_alone_looks_at_it() -> None:
    seen = step(observed(layers=1), observed(layers=4, seed=1), ((1, 4),))
    first, last = (s.hidden_states[-1][:, 0] for s in (seen.student, seen.require_teacher()))
    assert value(loss("pkd"), seen) == pytest.approx(2 * literal.angle(first, last).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (3, 3), (3, 6), (4, 12)])
def test_the_alignment_is_the_best_of_all_increasing_ones(rows: int, columns: int) -> None:
    for seed in range(20):
        costs = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
        best = min(itertools.combinations(range(columns), rows), key=lambda c: sum(costs[range(rows), c]).item())  # type: ignore[union-attr]
        assert align_layers(costs).tolist() == list(best)


def test_the_alignment_of_a_broken_model_still_names_layers() -> None:
    costs = torch.ones(3, 5)
    costs[1, 0] = torch.nan
    chosen = align_layers(costs)
    assert bool(((chosen >= 0) & (chosen < 5)).all())


def test_two_equal_rows_leave_the_relational_gradient_finite() -> None:
    student = observed()
    same = student.hidden_states[-1].detach().clone()
    same[1] = same[0]
    states = same.requires_grad_()
    student = replace(student, hidden_states=(*student.hidden_states[:-1], states))
    loss("rkd").compute(step(student, observed(seed=1)), None).backward()
    assert states.grad is not None
    assert bool(states.grad.isfinite().all())
    assert float(states.grad.abs().max()) > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_without_relations_costs_nothing(rows: int) -> None:
    seen, taught = step(observed(), observed(seed=1)), observed(seed=1)
    few = replace(
        seen,
        student=replace(seen.student, hidden_states=tuple(t[:rows] for t in seen.student.hidden_states)),
        teacher=replace(taught, hidden_states=tuple(t[:rows] for t in taught.hidden_states)),
        mask=seen.mask[:rows],
    )
    assert value(loss("rkd", distance_weight=0.0), few) == 0
    assert value(loss("rkd"), few) == pytest.approx(0, abs=1e-6)


# What all of them have in common


@EVERY
def test_padding_does_not_change_the_value(case: Case) -> None:
    seen, learned = case.step(), case.make_projection()
    expected = value(case.term, seen, learned)
    for other in (*(repadded(seen, junk) for junk in (0.0, -50.0, 1e3)), widened(seen, 40)):
        assert value(case.term, other, learned) == pytest.approx(expected, rel=1e-5)


@EVERY
def test_padding_gets_no_gradient_and_real_tokens_do(case: Case) -> None:
    seen, learned = case.step(), case.make_projection()
    found = slopes(case.term.compute(seen, learned), seen, learned)
    reached = {name: g for name, g in found.items() if not name.startswith("learned") and g.dim() > 2}
    assert reached or case.head == "sequence"
    for gradient in reached.values():
        axis = gradient.dim() - 2
        for row, length in enumerate(LENGTHS):
            assert float(gradient[row].narrow(axis - 1, length, max(LENGTHS) - length).abs().sum()) == 0


@EVERY
def test_a_model_that_agrees_with_its_teacher_has_nothing_to_learn(case: Case) -> None:
    if case.options.get("loss") == "cross_entropy":
        pytest.skip("a cross-entropy ends at the teacher's own entropy")
    given = case.step()
    seen = replace(given, teacher=given.student, pairs=((1, 1), (2, 2)))
    term = loss(case.name, **{k: v for k, v in case.options.items() if k != "teacher_layer"})
    assert value(term, seen, None) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("case", "parts"),
    [(c, parts) for c in CASES for parts in (False, True) if not parts or c.name in IN_PARTS],
    ids=str,
)
def test_nothing_waits_for_the_device(case: Case, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no numbers: whatever asks for one (`.item()`, `if`, a mask as an index) raises."""
    if parts:
        monkeypatch.setattr(base, "_AT_ONCE", 1)
    with FakeTensorMode(allow_non_fake_inputs=False):
        seen, learned = case.step(), case.make_projection()
        case.term.compute(seen, learned).backward()
        assert any(t.grad is not None for t in tensors(seen.student).values())


def test_fake_tensors_would_notice() -> None:
    class Waits(Loss):
        def compute(self, step: Step, learned: Any) -> Tensor:
            return step.student.hidden_states[1][step.mask].mean()

    with FakeTensorMode(), pytest.raises(Exception, match=r"nonzero|data-dependent|Data"):
        Waits().compute(CASES[0].step(), None)


@pytest.mark.parametrize("name", IN_PARTS)
def test_rows_in_parts_give_what_they_give_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == name and c.head in ("mask", "sequence"))
    seen, learned = case.step(), case.make_projection()
    whole = case.term.compute(seen, learned)
    made: list[int] = []
    log_softmax = Tensor.log_softmax
    monkeypatch.setattr(Tensor, "log_softmax", lambda t, *a: made.append(len(t)) or log_softmax(t, *a))
    monkeypatch.setattr(base, "_AT_ONCE", 2 * 2 * max(LENGTHS) ** 2)
    if name == "soft_labels":
        monkeypatch.setattr(base, "_AT_ONCE", 2 * 3)
    parts = case.term.compute(seen, learned)
    assert name == "soft_labels" or set(made) == {2}
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    ours, theirs = slopes(parts, seen, learned), slopes(whole, seen, learned)
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key])


@EVERY
def test_autocast_leaves_the_arithmetic_in_float32(case: Case) -> None:
    """Where nothing is projected; a projection is a layer like any other."""
    seen = case.step()
    if case.make_projection() is not None:
        return
    expected = value(case.term, seen)
    with torch.autocast("cpu", torch.bfloat16):
        assert value(case.term, seen) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_tells_its_title_paper_and_options(name: str) -> None:
    cls = LOSSES.get(name)
    assert "arXiv" in cls.source
    assert (cls.__doc__ or "").strip()
    assert all(option.description for option in cls.model_fields.values())
    assert loss(name).problems(shape(), shape()) == []


def test_the_documented_loss_is_the_one_that_ships() -> None:
    root = Path(base.__file__).parent
    page = (root.parents[2] / "docs" / "components.md").read_text(encoding="utf-8")
    assert (root / "cosine.py").read_text(encoding="utf-8") in page


# Parts of a batch


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "rkd" and not case.dynamic], ids=str)
def test_a_batch_may_be_split_whatever_its_rows_lengths(case: Case) -> None:
    """The parts' means, each times its share of the units, add up to the mean over all; likewise the gradients."""
    term, seen, learned = case.term, case.step(), case.make_projection()
    parts = [part(seen, slice(0, 1)), part(seen, slice(1, 3)), part(seen, slice(3, 4))]
    units = torch.stack([term.units(Units(p.mask, p.labels, p.task)) for p in parts])
    assert units.sum() == term.units(Units(seen.mask, seen.labels, seen.task))
    means = torch.stack([term.compute(p, learned) for p in parts])
    agree((means * units / units.sum()).sum(), term.compute(seen, learned), seen, learned)


def test_labels_are_counted_as_their_loss_counts_them() -> None:
    mask, tags = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1, -100, -100], [0, 1, 1]])
    counted = [
        loss("hard_labels").units(Units(mask, labels, SimpleNamespace(by_token=by_token))).item()
        for labels, by_token in ((tags, True), (torch.tensor([0, 1]), False))
    ]
    assert counted == [4, 2]


# Weights


def test_a_weight_is_constant_or_changes_over_the_steps() -> None:
    assert [loss("cosine", weight=0.5).weight_at(p) for p in (0.0, 0.3, 1.0)] == [0.5, 0.5, 0.5]
    linear = loss("cosine", weight={"start": 1.0, "end": 0.2})
    assert [linear.weight_at(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([1.0, 0.8, 0.2])
    cosine = loss("cosine", weight={"start": 0.0, "end": 2.0, "schedule": "cosine"})
    assert [cosine.weight_at(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.0, 1 - math.cos(math.pi / 4), 1, 2])
    assert Ramp(start=1.0, end=1.0).at(0.7) == 1.0


def test_weights_and_learned_modules_meet_in_the_objective() -> None:
    from hfcompress.models.shape import shape_of
    from hfcompress.training.objective import Objective

    parts = [
        loss("hidden_states", weight=0.5),
        loss("embeddings", weight={"start": 0.0, "end": 4.0}),
        loss("soft_labels", weight=0.0),
    ]
    student, teacher = factories.model("bert", hidden=16, **dropless("bert")), factories.model("bert", layers=4, seed=1)
    objective = Objective(student, parts, task(), shape_of(teacher.config.to_dict()), UNIFORM)
    batch = factories.batch()
    taught = observe(teacher, batch, objective.needs)
    found = objective(teacher=taught, progress=0.25, **batch)
    seen = replace(step(observe(student, batch, objective.needs), taught, UNIFORM), mask=batch["attention_mask"].bool())
    hidden, words = (
        value(term, seen, objective.learned[term.name]) for term in (loss("hidden_states"), loss("embeddings"))
    )
    assert found["loss"].item() == pytest.approx(0.5 * hidden + 1.0 * words, rel=1e-5)
    found["loss"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert reached >= {"learned.embeddings.weight", "learned.hidden_states.weight"}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("soft_labels", {"temperature": 0.0}, "temperature"),
        ("soft_labels", {"weight": -1.0}, "weight"),
        ("soft_labels", {"weight": {"start": -1.0, "end": 1.0}}, "weight"),
        ("soft_labels", {"weight": {"start": 1.0, "end": 0.0, "shape": "linear"}}, "unknown key 'shape'"),
        ("soft_labels", {"tinybert_compat": True, "loss": "mse"}, "`tinybert_compat` is a cross-entropy"),
        ("hidden_states", {"projection": "none"}, "projection"),
        ("hidden_states", {"tinybert_compat": True, "projection": "per_layer"}, "`tinybert_compat` needs"),
        ("hidden_states", {"tinybert_compat": True, "distance": "cosine"}, "`tinybert_compat` needs"),
        ("minilm", {"teacher_layer": 0}, "teacher_layer"),
        ("minilm_v2", {"relation_heads": 0}, "relation_heads"),
        ("rkd", {"of": "first"}, "of"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loss(name, **options)


# What cannot be compared


@pytest.mark.parametrize("name", ["attention_scores", "attention_probabilities", "minilm"])
def test_differing_heads_are_refused_head_by_head(name: str) -> None:
    found = loss(name).problems(shape(heads=2), shape(heads=4))
    assert found == [f"{name} compares head by head, and there are layers with 2, 4 heads; use minilm_v2"]
    assert loss(name).problems(shape(hidden=8), shape(hidden=16, layers=4)) == []


@pytest.mark.parametrize("name", ["attention_scores", "attention_probabilities"])
def test_heads_that_differ_from_layer_to_layer_are_refused(name: str) -> None:
    uneven = replace(shape(), layers=(Layer(1, 16), Layer(2, 16)))
    assert "1, 2 heads" in loss(name).problems(uneven, shape())[0]
    assert loss("minilm").problems(uneven, shape()) == []


@pytest.mark.parametrize("name", ["attention_scores", "attention_probabilities", "minilm"])
def test_attention_that_knows_positions_is_refused(name: str) -> None:
    unlike = [kind for kind, spec in ARCHITECTURES.items() if not spec.plain_attention]
    for kind in unlike:
        found = loss(name).problems(shape(), replace(shape(), architecture=kind))
        assert len(found) == 1
        assert f"those of the teacher ({kind}) also depend on positions; use minilm_v2 or hidden_states" in found[0]
        assert "the student" in loss(name).problems(replace(shape(), architecture=kind), shape())[0]
        assert loss("minilm_v2").problems(shape(), replace(shape(), architecture=kind)) == []


@pytest.mark.parametrize("name", ["minilm", "minilm_v2"])
def test_a_teacher_layer_that_is_not_there_is_refused(name: str) -> None:
    found = loss(name, teacher_layer=5).problems(shape(), shape(layers=4))
    assert found == [f"{name} uses the teacher's layer 5, and it has only 4; lower `teacher_layer`"]
    assert loss(name, teacher_layer=3).layers(shape(), shape(layers=4), UNIFORM) == ((2, 3),)
    assert loss(name).layers(shape(), shape(layers=4), UNIFORM) == ((2, 4),)


def test_layers_are_those_of_the_pairs_or_none() -> None:
    shapes = shape(), shape(layers=4)
    assert loss("attention_scores").layers(*shapes, UNIFORM) == UNIFORM
    for name in ("cosine", "embeddings", "rkd"):
        assert loss(name).layers(*shapes, UNIFORM) == ()


def test_relation_heads_have_to_divide_both_widths() -> None:
    student, teacher = shape(hidden=12, heads=3), shape(hidden=16, heads=8)
    found = loss("minilm_v2").problems(student, teacher)
    assert found == [
        "8 relation heads do not divide the student's width 12 and the teacher's 16; set `relation_heads` to one of "
        "1, 2, 4"
    ]
    assert loss("minilm_v2", relation_heads=4).problems(student, teacher) == []
    pruned = replace(shape(heads=4), layers=(Layer(4, 16), Layer(3, 16)))
    assert "the student's width 6" in loss("minilm_v2").problems(pruned, shape(heads=4))[0]


def test_cosine_needs_equal_widths() -> None:
    found = loss("cosine").problems(shape(), shape(12))
    assert "8 and the teacher's 12; use hidden_states with `distance: cosine`" in found[0]


def test_soft_labels_refuse_other_labels() -> None:
    term = loss("soft_labels")
    assert term.problems(shape(labels=2), shape(labels=3)) == ["the student has 2 labels and the teacher 3"]
    words = shape(head="mask")
    assert term.problems(words, replace(words, labels=9)) == []
    assert term.problems(words, replace(words, vocab=21)) == ["the student has 20 labels and the teacher 21"]


# On real models


def dropless(family: str) -> dict[str, float]:
    """Dropout would make two passes differ."""
    if family == "distilbert":
        return {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def met(name: str, family: str, batch: dict[str, Tensor], **student: Any) -> Step:
    term = loss(name)
    models = factories.model(family, **student, **dropless(family)), factories.model(family, layers=4, seed=1)
    seen = [observe(model, batch, term.needs) for model in models]
    mask = batch["attention_mask"].bool()
    return replace(step(seen[0], seen[1], UNIFORM), mask=mask)


@pytest.mark.parametrize(
    ("name", "family"),
    [*((name, "bert") for name in sorted(set(LOSSES.names()) - {"hard_labels", "rkd"})),
     *((name, family) for name in ("embeddings", "hidden_states", "minilm", "soft_labels")
       for family in ("distilbert", "roberta"))],
)  # fmt: skip
def test_a_padded_batch_of_a_model_gives_what_its_rows_give_alone(name: str, family: str) -> None:
    """A loss that counts tokens or pairs weighs each row by them; the others weigh rows alike."""
    batch, term = factories.batch(), loss(name)
    together, total, count = value(term, met(name, family, batch)), 0.0, 0
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        by_rows = ("minilm", "minilm_v2", "pkd", "soft_labels")
        entries = length**2 if name == "attention_scores" else 1 if name in by_rows else length
        total, count = total + value(term, met(name, family, alone)) * entries, count + entries
    assert together == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(LOSSES.names()) - {"hard_labels", "cosine"}))
def test_gradients_reach_the_narrower_student_and_what_is_learned(name: str) -> None:
    from hfcompress.models.shape import shape_of

    term, batch = loss(name), factories.batch()
    student = factories.model("bert", hidden=16, **dropless("bert"))
    teacher = factories.model("bert", layers=4, seed=1)
    shapes: list[Shape] = [shape_of(model.config.to_dict()) for model in (student, teacher)]
    assert term.problems(*shapes) == []
    learned = term.make_projection(*shapes)
    with torch.inference_mode():
        taught = observe(teacher, batch, term.needs)
    copied = Observation(
        taught.logits.clone(),
        tuple(t.clone() for t in taught.hidden_states),
        *({i: t.clone() for i, t in some.items()} for some in (taught.queries, taught.keys, taught.values)),
    )
    seen = replace(step(observe(student, batch, term.needs), copied, UNIFORM), mask=batch["attention_mask"].bool())
    term.compute(seen, learned).backward()
    words = student.get_input_embeddings().weight.grad
    assert words is not None
    assert float(words.abs().max()) > 0
    if learned is not None:
        assert all(float(p.grad.abs().max()) > 0 for p in learned.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["minilm", "minilm_v2"])
def test_a_last_layer_without_heads_is_passed_over(name: str) -> None:
    """A cut may empty its attention: the last layer that attends is compared, and trained, instead of an error."""
    cut = replace(shape(layers=2), layers=(Layer(4, 8), Layer(0, 8)))
    assert loss(name).layers(cut, shape(layers=2), ()) == ((1, 2),)
    none = replace(cut, layers=(Layer(0, 8), Layer(0, 8)))
    assert "the student has no heads left" in loss(name).problems(none, shape(layers=2))[0]
    assert "the teacher has no heads in layer 2" in loss(name, teacher_layer=2).problems(shape(layers=2), cut)[0]


def test_relation_heads_fit_whatever_a_cut_leaves() -> None:
    """A ranking over all layers decides how many heads the last one keeps: only what divides one head is sure."""
    whole = replace(shape(hidden=64, heads=4), head_dim=16)
    ranked = replace(whole.with_layers(2, 3, 8), even=False)
    (found,) = loss("minilm_v2", relation_heads=12).problems(ranked, whole)
    assert "is not known yet" in found
    assert "one of 1, 2, 4, 8, 16" in found
    assert loss("minilm_v2", relation_heads=16).problems(ranked, whole) == []
