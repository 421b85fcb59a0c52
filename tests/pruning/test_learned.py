"""Learned masks: the published formulas, the size that they come to, and that neither processes nor crashes matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of, unit_counts
from hfcompress.models.forward import observe
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.pruning.masks.hard_concrete import HardConcrete
from hfcompress.pruning.masks.units import GradualUnits
from hfcompress.pruning.masks.weights import GradualWeights
from hfcompress.pruning.schedules import GrowthTimes
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.training.overlay import TrainingOverlay
from tests import factories, masked


def l0(model: Any, target: Any, **options: Any) -> HardConcrete:
    masks: Any = CRITERIA.parse({"use": "l0", **options}).masks(model, target)  # type: ignore[attr-defined]
    return masks


def spread(masks: HardConcrete, seed: int = 0) -> HardConcrete:
    """Gates that have made up their minds differently."""
    with torch.no_grad():
        masks.log_alpha.copy_(3 * torch.randn(len(masks.log_alpha), generator=torch.Generator().manual_seed(seed)))
    return masks


def literal_gate(log_alpha: float, u: float) -> float:
    """Louizos et al. 2018, eq. 10 and 11, with CoFi's constants."""
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


def literal_open(log_alpha: float) -> float:
    """Louizos et al. 2018, eq. 12: the probability that a gate is not 0."""
    return 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))


# L0


def test_sampled_gates_follow_the_published_formula() -> None:
    masks = spread(l0(factories.model(), masked.target(least=(0, 0))))
    heads, neurons = masks.gates(0.25)
    draws = masks.noise(len(masks.log_alpha), 0.25).tolist()
    z = [literal_gate(a, u) for a, u in zip(masks.log_alpha.tolist(), draws, strict=True)]
    units, attention, ffn = z[:-4], z[-4:-2], z[-2:]
    assert heads[1].tolist() == pytest.approx([v * attention[1] for v in units[4:8]], abs=1e-5)
    assert neurons[0].tolist() == pytest.approx([v * ffn[0] for v in units[8:72]], abs=1e-5)
    assert neurons[1].tolist() == pytest.approx([v * ffn[1] for v in units[72:]], abs=1e-5)


def test_the_expected_size_is_that_of_many_samples() -> None:
    target = masked.target(0.5, least=(0, 0))
    masks = spread(l0(factories.model(), target, warmup=0.0))
    draws, alive = 3000, 0.0
    with torch.no_grad():
        for draw in range(draws):
            heads, neurons = masks.gates(draw / draws)
            alive += 1024 * sum(int((z > 0).sum()) for z in heads) + 64 * sum(int((z > 0).sum()) for z in neurons)
        masks.multipliers.copy_(torch.tensor([1.0, 0.0]))
        ahead = float(masks.penalty(1.0))  # s - t
    range_ = target.costs.whole - target.costs.fixed
    sampled = (range_ - alive / draws) / range_ - (target.costs.whole - target.budget) / range_
    assert ahead == pytest.approx(sampled, abs=0.01)
    values = masks.log_alpha.tolist()
    attention, ffn = values[-4:-2], values[-2:]
    exact = sum(1024 * literal_open(a) * literal_open(attention[i // 4]) for i, a in enumerate(values[:8]))
    exact += sum(64 * literal_open(a) * literal_open(ffn[i // 64]) for i, a in enumerate(values[8:-4]))
    assert ahead == pytest.approx((range_ - exact) / range_ - 0.5, abs=1e-5)


def test_the_penalty_is_the_lagrangian_and_its_target_ramps() -> None:
    masks = spread(l0(factories.model(), masked.target(0.4), warmup=0.2))
    with torch.no_grad():
        masks.multipliers.copy_(torch.tensor([1.0, 0.0]))
        saved = float(masks.penalty(0.0))
        masks.multipliers.copy_(torch.tensor([0.3, 0.7]))
        for progress, wanted in ((0.0, 0.0), (0.1, 0.3), (0.2, 0.6), (1.0, 0.6)):
            ahead = saved - wanted
            assert float(masks.penalty(progress)) == pytest.approx(0.3 * ahead + 0.7 * ahead**2, abs=1e-5)


def test_gates_start_as_published() -> None:
    masks = l0(factories.model(), masked.target(least=(0, 1)))
    assert len(masks.log_alpha) == 2 * 4 + 2 * 64 + 2  # attention blocks may die, FFN blocks may not
    assert masks.log_alpha[:8].tolist() == pytest.approx([10.0] * 8, abs=0.1)
    assert masks.log_alpha[8:-2].mean().item() == pytest.approx(0, abs=0.01)
    assert masks.log_alpha[8:-2].std().item() == pytest.approx(0.01, rel=0.3)
    assert masks.log_alpha[-2:].tolist() == pytest.approx([10.0] * 2, abs=0.1)
    masks.after_step(factories.model(), 1, 2)
    assert masks.log_alpha.max().item() == pytest.approx(math.log(100))
    assert masks.multipliers.tolist() == [0, 0]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_is_cut_out_gives_what_the_gated_model_gave(family: str) -> None:
    model = factories.model(family)
    heads, neurons = unit_counts(model)
    masks = spread(l0(model, masked.target(0.4, tuple(heads), tuple(neurons), least=(0, 0)))).eval()
    batch = factories.batch()
    with torch.no_grad():
        with masks.lay_over(model, 1.0):
            gated = observe(model, batch).logits
            torch.testing.assert_close(observe(model, batch).logits, gated)  # nothing is drawn
        plain = observe(model, batch).logits
        masks.settle(model)
        settled, small = observe(model, batch).logits, observe(cut(model, masks.keep()), batch).logits
    torch.testing.assert_close(settled, gated, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small, gated, atol=1e-5, rtol=1e-5)
    assert (plain - gated).abs().max() > 1e-3


def test_what_stays_has_the_soft_value_of_its_gate() -> None:
    masks = spread(l0(factories.model(), masked.target(0.4, least=(0, 0)))).eval()
    values = masks.log_alpha.tolist()
    soft = [1 / (1 + math.exp(-a / (2 / 3) * 0.8)) for a in values]  # CoFi's code
    heads, neurons = masks.gates(1.0)
    for layer, kept in enumerate(masks.keep()):
        wanted = [soft[layer * 4 + h] * soft[-4 + layer] if h in kept.heads else 0 for h in range(4)]
        assert heads[layer].tolist() == pytest.approx(wanted, abs=1e-5)
        wanted = [soft[8 + layer * 64 + n] * soft[-2 + layer] if n in kept.neurons else 0 for n in range(64)]
        assert neurons[layer].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_block_dies_where_it_may_and_neurons_stay_in_groups() -> None:
    target = masked.target(0.3, group=8, least=(0, 0))
    masks = l0(factories.model(), target)
    with torch.no_grad():
        masks.log_alpha[-4] = masks.log_alpha[-1] = -4.0  # the first attention block, the second FFN block
    first, second = masks.keep()
    assert (first.heads, second.neurons) == ((), ())
    assert len(first.neurons) % 8 == 0
    alive = l0(factories.model(), masked.target(0.3, group=8, least=(1, 3)))
    assert all(kept.heads and len(kept.neurons) >= 8 for kept in alive.keep())


def test_l0_reaches_its_size(tmp_path: Path, data: Path) -> None:
    model = factories.model(ffn=256)
    target = masked.target(0.5, neurons=(256, 256))
    masks = l0(model, target, learning_rate=0.1, multiplier_learning_rate=0.3)
    masked.trained(model, masks, data, tmp_path, epochs=30.0, warmup=0.0, schedule="constant", checkpoint_steps=999)
    kept = masked.cost(target, masks.keep())
    assert target.budget * 0.995 <= kept <= target.budget
    with torch.no_grad():
        heads, neurons = masks.probabilities()
    expected = (
        target.costs.fixed + sum(1024 * float(p.sum()) for p in heads) + sum(64 * float(p.sum()) for p in neurons)
    )
    assert expected == pytest.approx(target.budget, rel=0.03)  # the Lagrangian got there, not the last choice alone
    small = cut(model, masks.keep())
    assert small.num_parameters() < model.num_parameters()


# Movement


def movement(model: Any, kind: str, **options: Any) -> Any:
    criterion: Any = CRITERIA.parse({"use": "movement", **options})
    if kind == "units":
        return criterion.masks(model, masked.target(0.5, least=(0, 0)))
    return criterion.weight_masks(
        model, SparsityPattern(share=0.5, block=(2, 4)) if kind == "blocks" else SparsityPattern(share=0.5)
    )


def scored(masks: Any, seed: int = 0) -> Any:
    """With scores as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return masks


def backward(model: Any) -> None:
    model(**factories.batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()


@pytest.mark.parametrize("mode", ["topk", "threshold"])
@pytest.mark.parametrize("kind", ["weights", "blocks"])
def test_scores_of_weights_get_the_published_gradient(kind: str, mode: str) -> None:
    """Sanh et al. 2020, section 4: `W' = W ⊙ Top_v(S)` or `W ⊙ (σ(S) > τ)`, `∂L/∂S = ∂L/∂W' ⊙ W`."""
    model, literal, tau = factories.model(), factories.model(), 0.4
    options = {"threshold": tau} if mode == "threshold" else {}
    masks = scored(movement(model, kind, mode=mode, **options))
    with masks.lay_over(model, 1.0):
        backward(model)
    rows, columns = (2, 4) if kind == "blocks" else (1, 1)
    kept = {}
    for name, scores in zip(masks.names, masks.scores, strict=True):
        if mode == "topk":
            mask = scores > scores.flatten().kthvalue(scores.numel() // 2).values
        else:
            mask = 1 / (1 + torch.exp(-scores)) > tau
        kept[name] = mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        with torch.no_grad():
            literal.get_parameter(name).mul_(kept[name])
    assert len(kept) == 12
    backward(literal)
    for name, scores in zip(masks.names, masks.scores, strict=True):
        weight, flow = model.get_parameter(name), literal.get_parameter(name).grad
        by_block = (flow * weight.detach()).unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))
        torch.testing.assert_close(scores.grad, by_block, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(weight.grad, flow * kept[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["topk", "threshold"])
def test_scores_of_units_get_the_sum_over_their_columns(mode: str) -> None:
    """Lagunas et al. 2021: one score for a block of weights, `∂L/∂S = Σ ∂L/∂W' ⊙ W`."""
    model, literal, tau = factories.model(), factories.model(), 0.4
    masks = scored(movement(model, "units", mode=mode, **({"threshold": tau} if mode == "threshold" else {})))
    with masks.lay_over(model, 1.0):
        backward(model)
    keep = masks.keep()
    scores, gradients = (masks.split(x) for x in (masks.scores.detach(), masks.scores.grad))
    modules = spec_of(model).modules
    columns = {}
    for index, layer in enumerate(layers_of(literal)):
        for part, path in enumerate((modules.attention_output, modules.ffn_out)):
            own, weight = scores[part][index], layer.get_parameter(f"{path}.weight")
            stay: Tensor = 1 / (1 + torch.exp(-own)) > tau
            if mode == "topk":
                stay = torch.zeros(len(own), dtype=torch.bool)
                stay[list((keep[index].heads, keep[index].neurons)[part])] = True
            columns[index, part] = weight, weight.detach().clone()
            with torch.no_grad():
                weight.mul_(stay.repeat_interleave(weight.shape[1] // len(own)))
    backward(literal)
    for (index, part), (weight, before) in columns.items():
        wanted = (weight.grad * before).sum(0).unflatten(0, (len(scores[part][index]), -1)).sum(1)
        torch.testing.assert_close(gradients[part][index], wanted, atol=1e-5, rtol=1e-4)


def test_movement_follows_the_cubic_law_and_keeps_within_the_budget() -> None:
    masks = scored(movement(factories.model(), "units"))
    whole, budget = masks.target.costs.whole, masks.target.budget
    for progress in (0.0, 0.1, 0.3, 0.8, 1.0):
        done = 1 - (1 - min(max((progress - 0.1) / 0.7, 0), 1)) ** 3
        wanted = whole + done * (budget - whole)
        heads, neurons = masks.gates(progress)
        spent = masked.target().costs.fixed + 1024 * sum(z.sum().item() for z in heads)
        spent += 64 * sum(z.sum().item() for z in neurons)
        assert wanted - 64 < spent <= wanted + 1e-6
    weights = scored(movement(factories.model(), "weights"))
    masks_now = weights.make_masks(factories.model(), 0.3)
    done = 1 - (1 - 0.2 / 0.7) ** 3
    assert all(int((m == 0).sum()) == round(m.numel() * 0.5 * done) for m in masks_now)


def test_the_threshold_and_its_penalty_grow_together() -> None:
    masks = scored(movement(factories.model(), "weights", mode="threshold", threshold=0.3, penalty=20.0))
    for progress in (0.0, 0.45, 1.0):
        done = 1 - (1 - min(max((progress - 0.1) / 0.7, 0), 1)) ** 3
        means = [float((1 / (1 + torch.exp(-s.detach()))).mean()) for s in masks.scores]
        assert masks.penalty(progress).item() == pytest.approx(20 * done * sum(means) / 12, rel=1e-5)
        for mask, s in zip(masks.make_masks(factories.model(), progress), masks.scores, strict=True):
            assert torch.equal(mask > 0, s.sigmoid() > 0.3 * done)
    assert movement(factories.model(), "weights").penalty(0.5) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 0.5, "end": 0.5}, r"`end` \(0.5\) must come after `begin` \(0.5\)"),
        ({"penalty": 3.0}, "`penalty` is only for `mode: threshold`"),
        ({"threshold": 0.2}, "`threshold` is only for `mode: threshold`"),
    ],
)
def test_options_that_would_change_nothing_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CRITERIA.parse({"use": "movement", **options})


@pytest.mark.parametrize("kind", ["units", "weights"])
def test_movement_learns_and_ends_in_the_same_surgery(kind: str, tmp_path: Path, data: Path) -> None:
    from hfcompress.pruning.sparsity import share_of_zeros

    model = factories.model()
    masks = movement(model, kind)
    masked.trained(model, masks, data, tmp_path, epochs=5.0)
    batch = factories.batch()
    with torch.no_grad(), masks.lay_over(model, 1.0):
        covered = model(**batch).logits
    masks.settle(model)
    if kind == "units":
        assert masked.cost(masks.target, masks.keep()) <= masks.target.budget
        model = cut(model, masks.keep())
    else:
        assert share_of_zeros(model) == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, covered, atol=1e-5, rtol=1e-5)


# What must not matter: where the training was interrupted, and how many processes there are


def _gradual(model: Any) -> TrainingOverlay:
    def rescore(scored: Any, share: float) -> list[Keep]:
        norms = [m.weight.detach().norm(dim=0) for n, m in scored.named_modules() if n.endswith(".output.dense")]
        neurons = [n for n in norms if len(n) == 64]
        return [Keep((0, 2), tuple(sorted(n.topk(64 - round(32 * share)).indices.tolist()))) for n in neurons]

    return GradualUnits(model, rescore, GrowthTimes(0.0, 0.8, 2, "cubic"))


def _gradual_weights(model: Any) -> TrainingOverlay:
    def magnitudes(scored: Any) -> dict[str, Tensor]:
        return {name: scored.get_parameter(name).abs() for name in masks.names}

    masks = GradualWeights(model, SparsityPattern(share=0.5), magnitudes, GrowthTimes(0.0, 0.8, 2, "cubic"))
    return masks


KINDS: dict[str, Callable[[Any], TrainingOverlay]] = {
    "l0": lambda model: l0(model, masked.target(0.5, least=(0, 0)), learning_rate=0.1),
    "movement of units": lambda model: movement(model, "units"),
    "movement of weights": lambda model: movement(model, "weights"),
    "gradual": _gradual,
    "gradual weights": _gradual_weights,
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_under_masks_ends_where_an_uninterrupted_one_does(
    kind: str, tmp_path: Path, data: Path
) -> None:
    masked.assert_an_interruption_changes_nothing(KINDS[kind], data, tmp_path, stop=5, every=3)


def test_noise_is_of_the_seed_and_the_step() -> None:
    masks = TrainingOverlay()
    first = masks.noise(8, 0.25)
    torch.manual_seed(9)
    assert torch.equal(masks.noise(8, 0.25), first)
    assert not torch.equal(masks.noise(8, 0.26), first)
    masks.seed = 1
    assert not torch.equal(masks.noise(8, 0.25), first)
    assert first.min() >= 0
    assert first.max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["l0", "movement of weights"])
def test_two_processes_learn_the_masks_that_one_learns(kind: str, tmp_path: Path, data: Path) -> None:
    masked.assert_two_processes_train_as_one(__name__, kind, KINDS[kind], data, tmp_path, epochs=3.0, atol=1e-5)
