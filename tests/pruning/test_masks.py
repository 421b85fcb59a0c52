"""Masks in a training: what they cover, what they end in, and that the training treats them as it should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.allocation import keep_highest
from hfcompress.pruning.costs import Costs, Target
from hfcompress.pruning.masks.units import GradualUnits, expect_cost
from hfcompress.pruning.masks.weights import GradualWeights
from hfcompress.pruning.schedules import GrowthTimes, share_done_between
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.training.overlay import STEADY, TrainingOverlay
from hfcompress.utils.errors import HfcompressError
from tests import factories, masked
from tests.masked import cost_of


def logits(model: Any) -> Tensor:
    """What a model says to the tiny batch."""
    with torch.no_grad():
        return model(**factories.batch()).logits


# Growth


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0])
def test_the_cut_grows_by_the_published_law(progress: float) -> None:
    begin, end = 0.2, 0.8
    t, t0, n_delta, s_i, s_f = progress, begin, end - begin, 0.0, 1.0  # arXiv:1710.01878, eq. 1
    literal = s_f + (s_i - s_f) * (1 - (t - t0) / n_delta) ** 3
    wanted = 0.0 if progress < begin else 1.0 if progress > end else literal
    assert share_done_between("cubic", progress, begin, end) == pytest.approx(wanted)
    assert share_done_between("linear", progress, begin, end) == pytest.approx(min(max((t - t0) / n_delta, 0), 1))


@pytest.mark.parametrize(("curve", "power"), [("cubic", 3), ("linear", 1)])
def test_gradual_gates_close_when_and_as_far_as_the_schedule_says(curve: Any, power: int) -> None:
    model, asked = factories.model().train(), []

    def rescore(scored: Any, share: float) -> list[Keep]:
        assert not scored.training
        asked.append(share)
        return [Keep((0, 2), tuple(range(64 - round(32 * share)))), Keep((1,), ())]

    masks = GradualUnits(model, rescore, GrowthTimes(0.2, 0.75, 4, curve))
    for step in range(1, 21):
        masks.after_step(model, step, 20)
        # Every fourth step from a fifth of the twenty on, and at three quarters of them, where it ends.
        assert len(asked) == sum(step >= at for at in (8, 12, 15))
    assert model.training
    assert asked == pytest.approx([1 - (1 - (step / 20 - 0.2) / 0.55) ** power for step in (8, 12, 15)])
    assert masks.keep() == [Keep((0, 2), tuple(range(32))), Keep((1,), ())]


def test_what_gates_closed_is_scored_as_worth_nothing() -> None:
    model, closed = factories.model(), Keep((0, 1), tuple(range(8)))
    seen = []

    def rescore(scored: Any, share: float) -> list[Keep]:
        seen.append(logits(scored))
        return [closed, closed]

    masks = GradualUnits(model, rescore, GrowthTimes(0.0, 1.0, 1, "linear"))
    masks.after_step(model, 1, 2)
    masks.after_step(model, 2, 2)
    torch.testing.assert_close(seen[0], logits(model))
    torch.testing.assert_close(seen[1], logits(cut(model, [closed, closed])))


def test_gradual_weights_come_back_where_they_matter_again() -> None:
    model = factories.model()
    name = "bert.encoder.layer.0.output.dense.weight"
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    masks = GradualWeights(
        model,
        SparsityPattern(share=0.5),
        lambda m: {n: m.get_parameter(n).abs() for n in masks.names},
        GrowthTimes(0, 0.5, 1, "linear"),
    )
    masks.after_step(model, 1, 4)  # half of the cutting: a quarter of the weights
    masks.eval()

    def covered() -> Tensor:
        with masks.lay_over(model, 0.5):
            return model.bert.encoder.layer[0].output.dense.weight.detach().clone()

    low = before.abs() <= before.abs().flatten().kthvalue(before.numel() // 4).values
    assert torch.equal(covered(), before * ~low)
    with torch.no_grad():
        weight.mul_(torch.where(low, 100.0, 1.0))  # grown while they were covered
    masks.after_step(model, 2, 4)
    grown = weight.detach().abs()
    low = grown <= grown.flatten().kthvalue(before.numel() // 2).values
    assert torch.equal(covered(), weight.detach() * ~low)
    assert torch.equal(model.get_parameter(name), weight)  # as it was, outside
    masks.settle(model)
    assert torch.equal(weight.detach() == 0, low)


def test_a_pattern_that_does_not_fit_is_refused_before_any_training() -> None:
    with pytest.raises(HfcompressError, match="do not divide"):
        GradualWeights(
            factories.model(), SparsityPattern(share=0.5, block=(5, 5)), lambda _: {}, GrowthTimes(0, 1, 1, "linear")
        )


# What there is room for


def _ranked_by_hand(scores: list[Tensor], tables: Any, groups: list[int], least: list[int], room: float) -> list[int]:
    """The highest first; what is too dear is passed over, with what is behind it in its block."""
    counts, shut, candidates = list(least), set(), []
    room -= sum(table[n] for table, n in zip(tables, least, strict=True))
    for block, (values, group) in enumerate(zip(scores, groups, strict=True)):
        ordered = sorted(values.tolist(), reverse=True)
        for rank in range(least[block], len(tables[block]) - 1):
            mean = sum(ordered[rank * group : (rank + 1) * group]) / group
            candidates.append((-mean, block, rank))
    for _, block, rank in sorted(candidates):
        price = tables[block][rank + 1] - tables[block][rank]
        if block in shut or price > room:
            shut.add(block)
        else:
            counts[block], room = rank + 1, room - price
    return counts


@pytest.mark.parametrize(("seed", "least", "group"), product(range(6), (0, 1), (1, 4)))
def test_the_highest_scores_stay_that_the_budget_has_room_for(seed: int, least: int, group: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.rand(n, generator=generator)  # noqa: E731
    heads, neurons = [draw(4), draw(3), draw(0)], [draw(16), draw(8), draw(16)]
    tables = [(0.0, *(draw(n) * 9 + 1).double().cumsum(0).tolist()) for n in (4, 3, 0, *(16 // group, 8 // group) * 1)]
    tables.append((0.0, *(draw(16 // group) + 0.5).double().cumsum(0).tolist()))
    costs = Costs(tuple(tables[:3]), tuple(tables[3:]), group, fixed=5.0)
    target = Target(costs, 5 + 0.5 * (costs.whole - 5), least, least)
    keep = keep_highest(heads, neurons, target)
    groups, lows = [1, 1, 1, group, group, group], [least, least, 0, least, least, least]
    counts = _ranked_by_hand([*heads, *neurons], tables, groups, lows, target.budget - 5)
    assert [len(k.heads) for k in keep] == counts[:3]
    assert [len(k.neurons) for k in keep] == [n * group for n in counts[3:]]
    assert cost_of(costs, [len(k.heads) for k in keep], [len(k.neurons) for k in keep]) <= target.budget
    for values, kept in zip([*heads, *neurons], [*(k.heads for k in keep), *(k.neurons for k in keep)], strict=True):
        assert list(kept) == sorted(values.argsort(descending=True)[: len(kept)].tolist())


def test_everything_stays_where_the_budget_has_room_for_everything() -> None:
    whole = masked.target(1.0)
    keep = keep_highest([torch.rand(4)] * 2, [torch.rand(64)] * 2, whole)
    assert keep == [Keep(tuple(range(4)), tuple(range(64)))] * 2


def test_expected_cost_reads_between_two_counts_and_lets_gradients_through() -> None:
    costs = Costs(((0.0, 10.0, 30.0),), ((0.0, 4.0, 6.0),), group=2, fixed=1.0)
    heads, neurons = torch.tensor(1.25, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    found = expect_cost(costs, [heads], [neurons])
    assert found.item() == pytest.approx(1 + 10 + 0.25 * 20 + 0.5 * 4)
    found.backward()
    assert (float(heads.grad or 0), float(neurons.grad or 0)) == (20.0, 2.0)
    most = expect_cost(costs, [torch.tensor(2.0)], [torch.tensor(4.0)])
    assert float(most) == costs.whole


# In training


class Pushy(TrainingOverlay):
    """Masks with parameters of their own and a gradient that dwarfs the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(()))
        self.modes: list[tuple[bool, float]] = []
        self.steps: list[tuple[int, int]] = []

    @contextmanager
    def lay_over(self, model: Any, progress: float) -> Iterator[None]:
        self.modes.append((self.training, progress))
        yield

    def penalty(self, progress: float) -> Tensor:
        return 1e6 * (self.low.sum() + self.high)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.low], "lr": 0.5, "weight_decay": 0.0},
                {"params": [self.high], "lr": 0.25, "weight_decay": 0.0, "maximize": True, STEADY: True}]  # fmt: skip

    def after_step(self, model: Any, step: int, steps: int) -> None:
        self.steps.append((step, steps))


class Watch(TrainerCallback):
    """Writes down what the optimizer is given."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.rates: list[list[float]] = []
        self.logs: list[dict[str, float]] = []
        self.optimizer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        gradients = [p.grad.flatten() for p in model.student.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        if isinstance(model.masks, Pushy):
            assert torch.equal(model.masks.low.grad, torch.full((3,), 1e6))

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.optimizer = optimizer
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))


def test_masks_have_groups_and_rates_of_their_own_and_do_not_use_up_the_norm(tmp_path: Path, data: Path) -> None:
    masks, watch = Pushy(), Watch()
    masked.trained(factories.model(), masks, data, tmp_path, [watch], epochs=1.0, warmup=0.5, max_grad_norm=0.01)
    groups = watch.optimizer.param_groups
    named = [id(p) for group in groups for p in group["params"]]
    assert len(named) == len(set(named))
    assert [group["maximize"] for group in groups] == [False, False, False, True]
    # Six steps: three of warm-up, three down; what is written down is the rate of the step that comes next.
    shares = [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]
    assert [rates[0] for rates in watch.rates] == pytest.approx([1e-3 * share for share in shares])
    assert [rates[2] for rates in watch.rates] == pytest.approx([0.5 * share for share in shares])
    assert [rates[3] for rates in watch.rates] == [0.25] * 6
    assert masks.high.item() == pytest.approx(6 * 0.25, rel=1e-4)  # Adam's step is the rate; upwards
    assert masks.low[0].item() == pytest.approx(-0.5 * sum(shares), rel=1e-4)  # downwards
    assert watch.norms == pytest.approx([0.01] * 6, rel=1e-3)  # clipped as if there were no masks
    assert masks.steps == [(step, 6) for step in range(1, 7)]
    assert masks.modes == [(True, pytest.approx(step / 6)) for step in range(6)] + [(False, 1.0)]
    logged = [logs for logs in watch.logs if "loss_mask" in logs]
    assert len(logged) == 6
    for logs in logged:
        assert logs["loss_mask"] + logs["loss_hard_labels"] == pytest.approx(logs["loss"], rel=1e-6, abs=1e-3)
        assert logs["grad_norm"] < 1e3


def test_the_best_model_is_not_looked_for_while_masks_close(tmp_path: Path, data: Path) -> None:
    with pytest.raises(HfcompressError, match=r"before they have closed\n.*leave `keep_best` out"):
        masked.trained(factories.model(), Pushy(), data, tmp_path, keep_best=True)


def test_after_the_cut_the_optimizer_holds_no_tensor_that_was_cut(tmp_path: Path, data: Path) -> None:
    model, keep = factories.model(), [Keep((0, 3), tuple(range(0, 64, 2))), Keep((2,), (5, 6, 7))]
    masks, first, second = GradualUnits(model, lambda *_: keep, GrowthTimes(0, 0.5, 1, "cubic")), Watch(), Watch()
    found = masked.trained(model, masks, data, tmp_path / "gates", [first])
    masks.settle(model)
    small = cut(model, masks.keep())
    assert masks.keep() == keep
    masked.trained(small, None, data, tmp_path / "recovered", [second], epochs=1.0)
    held = [p for group in second.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in small.parameters()}
    assert {id(p) for p in held}.isdisjoint(id(p) for p in model.parameters())
    assert sum(p.numel() for p in held) == small.num_parameters() < model.num_parameters()
    assert set(second.optimizer.optimizer.state) <= set(held)
    assert 0 <= found <= 1


def test_the_score_is_that_of_the_model_that_is_cut_out(tmp_path: Path, data: Path) -> None:
    from hfcompress.training.evaluate import score

    model, keep = factories.model(), [Keep((0, 3), tuple(range(0, 64, 2))), Keep((2,), (5, 6, 7))]
    masks = GradualUnits(model, lambda *_: keep, GrowthTimes(0, 0.5, 1, "cubic"))
    found = masked.trained(model, masks, data, tmp_path, epochs=1.0)
    with masks.lay_over(model, 1.0):
        gated = logits(model)
    task = masked.task_of(tmp_path, data)
    small = cut(model, masks.keep())
    torch.testing.assert_close(logits(small), gated, atol=1e-5, rtol=1e-5)
    assert score(small, masked.rows_of(task)["dev"], factories.tokenizer(), task) == found
