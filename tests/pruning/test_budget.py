"""What units cost, and the best choice under a budget, against brute force and the published search."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hfcompress.models.architectures import ARCHITECTURES, layers_of
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.models.surgery import cut
from hfcompress.pruning.allocation import keep_best_sum, solve_budget
from hfcompress.pruning.budget import Budget, costs_of, target_of
from hfcompress.pruning.costs import Costs, Target
from hfcompress.pruning.criteria.base import Scores
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.masked import cost_of

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = sorted(ARCHITECTURES)
KINDS = ("parameters", "macs", "bytes")


def shape_from(family: str, **sizes: int) -> Shape:
    return shape_of(factories.model(family, **sizes).config.to_dict())


def kept_shape(shape: Shape, heads: tuple[int, ...], neurons: tuple[int, ...]) -> Shape:
    """The shape with so many head groups and neurons in each layer's weights; shared weights are every layer's."""
    runs = len(shape.layers) // len(heads)
    layers = [Layer(h * shape.group, n) for h, n in zip(heads, neurons, strict=True)]
    return replace(shape, layers=tuple(layers) * runs)


# The knapsack


def draw(generator: random.Random) -> tuple[list[list[float]], list[list[float]], Target]:
    """Two layers of a few units, in every mix: ranked or any values, costs by the unit, of any kind, or not rising."""

    def block(most: int) -> tuple[list[float], tuple[float, ...]]:
        units = generator.randint(0, most)
        if generator.random() < 0.5:
            gains = sorted((generator.random() for _ in range(units)), reverse=True)
            price = generator.choice([3, 7])
            return [0.0, *itertools.accumulate(gains)], tuple(price * k for k in range(units + 1))
        prices = tuple(generator.choice([generator.uniform(0, 9), generator.randint(0, 9)]) for _ in range(units + 1))
        return [generator.uniform(-1, 3) for _ in range(units + 1)], prices

    heads, neurons = [block(4) for _ in range(2)], [block(5) for _ in range(2)]
    group, fixed = generator.choice([1, 8]), generator.choice([0.0, 5.0])
    costs = Costs(tuple(c for _, c in heads), tuple(c for _, c in neurons), group, fixed)
    dearest = fixed + sum(max(c) for _, c in (*heads, *neurons))
    least = generator.choice([0, 1, 2])
    target = Target(costs, generator.uniform(0.1, 1.1) * dearest, least, generator.choice([0, 1, group]))
    return [v for v, _ in heads], [v for v, _ in neurons], target


def brute_force(heads: list[list[float]], neurons: list[list[float]], target: Target) -> tuple[float, float] | None:
    """The largest value that fits and the lowest cost at which it is had, of all choices."""
    costs, found = target.costs, []
    blocks = (*costs.heads, *costs.neurons)
    groups = -(-target.neurons // costs.group)
    least = [min(target.heads, len(c) - 1) for c in costs.heads] + [min(groups, len(c) - 1) for c in costs.neurons]
    for counts in itertools.product(*(range(low, len(c)) for low, c in zip(least, blocks, strict=True))):
        cost = costs.fixed + sum(c[k] for c, k in zip(blocks, counts, strict=True))
        if cost <= target.budget:
            found.append((sum(v[k] for v, k in zip((*heads, *neurons), counts, strict=True)), -cost))
    return max(found, default=None)


def worth(values: list[list[float]], counts: Any) -> float:
    return sum(v[k] for v, k in zip(values, counts, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_no_other_choice_is_worth_more(seed: int) -> None:
    generator, solved = random.Random(seed), 0
    for _ in range(40):
        heads, neurons, target = draw(generator)
        expected = brute_force(heads, neurons, target)
        if expected is None:
            with pytest.raises(HfcompressError, match="what must stay costs"):
                solve_budget(heads, neurons, target)
            continue
        found_heads, found_neurons = solve_budget(heads, neurons, target)
        groups = [n // target.costs.group for n in found_neurons]
        assert worth(heads, found_heads) + worth(neurons, groups) == pytest.approx(expected[0], abs=1e-9)
        cost = cost_of(target.costs, found_heads, found_neurons)
        assert cost <= target.budget * (1 + 1e-12)
        assert cost == pytest.approx(-expected[1])
        assert all(h >= min(target.heads, len(c) - 1) for h, c in zip(found_heads, target.costs.heads, strict=True))
        solved += 1
    assert solved > 10


def kwon_search(
    heads: list[torch.Tensor], neurons: list[torch.Tensor], head: float, neuron: float, budget: float
) -> float:
    """Kwon et al. 2022, arXiv:2204.09656, mask search: for each number of heads, what is left goes to neurons."""
    ranked_heads, ranked_neurons = (torch.cat(s).sort(descending=True).values for s in (heads, neurons))
    best = 0.0
    for count in range(len(ranked_heads) + 1):
        left = int((budget - count * head) // neuron)
        if left >= 0:
            best = max(best, float(ranked_heads[:count].sum() + ranked_neurons[:left].sum()))
    return best


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_macs_budget_comes_to_what_the_published_search_finds(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = shape_from("bert", layers=6, hidden=48, heads=12, ffn=192)
    heads = [torch.rand(12, generator=generator, dtype=torch.float64) ** 3 for _ in range(6)]
    neurons = [torch.rand(192, generator=generator, dtype=torch.float64) ** 5 for _ in range(6)]
    target = target_of(Budget(macs=share), shape, shape, 1, 20, empty_blocks=True)
    keep = keep_best_sum(Scores(heads, neurons), target, normalise=False)
    total = sum(float(h[list(k.heads)].sum() + n[list(k.neurons)].sum())
                for h, n, k in zip(heads, neurons, keep, strict=True))  # fmt: skip
    per_head, per_neuron = 4 * 20 * 48 * 4 + 2 * 20 * 20 * 4, 2 * 20 * 48
    assert total == pytest.approx(kwon_search(heads, neurons, per_head, per_neuron, target.budget), rel=1e-9)


def test_of_choices_worth_the_same_the_cheapest_is_taken() -> None:
    costs = Costs(((0, 4, 9),), ((0, 5, 2),))
    assert solve_budget([[0, 1, 1]], [[0, 1, 1]], Target(costs, 14, 0, 0)) == ((1,), (2,))
    assert solve_budget([[0, 0, 0]], [[0, 0, 0]], Target(costs, 14, 0, 0)) == ((0,), (0,))


def test_equal_units_are_taken_in_order() -> None:
    costs = Costs(((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (0, 1, 2)), group=8)
    values = [[0, 1, 2], [0, 1, 2]]
    assert solve_budget(values, values, Target(costs, 5, 0, 0)) == ((2, 2), (8, 0))
    assert solve_budget(values, values, Target(costs, costs.whole)) == ((2, 2), (16, 16))


def test_a_budget_that_is_too_small_is_told_with_the_smallest_possible() -> None:
    costs = Costs(((0, 10, 20),), ((0, 10, 20),), fixed=10)
    with pytest.raises(HfcompressError, match=r"0\.2000 of the whole.*0\.6000 of it") as told:
        solve_budget([[0, 1, 2]], [[0, 1, 2]], Target(costs, 10))
    assert "at least 0.6000" in told.value.problems[0].fix
    assert solve_budget([[0, 1, 2]], [[0, 1, 2]], Target(costs, 0.6 * costs.whole)) == ((1,), (1,))


def test_fractions_that_just_fit_do() -> None:
    costs = Costs(((0.0, 0.1), (0.0, 0.2), (0.0, 0.3)), ((0.0, 0.4), (0.0, 0.5), (0.0, 0.7)))
    values = [[0.0, 1.0]] * 3
    for order in itertools.permutations((0.1, 0.2, 0.3, 0.4, 0.5, 0.7)):
        assert solve_budget(values, values, Target(costs, sum(order), 1, 1)) == ((1, 1, 1), (1, 1, 1))


# What units cost


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_add_up_to_the_shape_s(family: str, kind: str) -> None:
    shape = shape_from(family, layers=3)
    costs = costs_of(Budget(**{kind: 0.5}), shape, 8, 20)
    groups, runs = shape.layers[0].heads // shape.group, len(costs.heads)
    assert runs == (1 if shape.spec.shared_layers else 3)
    for heads, neurons in (((groups, 0, 1), (64, 8, 0)), ((1, groups, 1), (16, 56, 64)), ((0, 0, 0), (0, 0, 0))):
        small = kept_shape(shape, heads[:runs], neurons[:runs])
        bare = replace(shape, layers=())
        amounts = {
            "parameters": small.encoder_parameters,
            "macs": small.macs(20) - bare.macs(20),
            "bytes": small.bytes - bare.bytes,
        }
        assert cost_of(costs, heads[:runs], neurons[:runs]) == amounts[kind]
    assert costs.whole == cost_of(costs, (groups,) * runs, (64,) * runs)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_cut_model_keeps_the_share_of_the_layers_parameters(share: float) -> None:
    model = factories.model(layers=3, hidden=32, heads=4, ffn=128)
    shape, generator = shape_of(model.config.to_dict()), torch.Generator().manual_seed(0)
    scores = Scores([torch.rand(4, generator=generator) for _ in range(3)],
                    [torch.rand(128, generator=generator) for _ in range(3)])  # fmt: skip
    small = cut(model, keep_best_sum(scores, target_of(Budget(parameters=share), shape, shape, 8, 20), normalise=True))
    before, after = (sum(p.numel() for layer in layers_of(m) for p in layer.parameters()) for m in (model, small))
    group = 8 * (2 * 32 + 1)
    assert share * before - group < after <= share * before


def test_a_round_takes_its_part_of_the_whole_model_s_cut() -> None:
    shape = shape_from("bert", layers=2)
    now = replace(shape, layers=(Layer(2, 32), Layer(4, 64)))
    budget, whole = Budget(macs=0.4), costs_of(Budget(macs=0.4), shape, 8, 20).whole
    target = target_of(budget, shape, now, 8, 20, done=0.5)
    assert target.budget == pytest.approx(0.7 * whole)
    assert [len(block) for block in target.costs.heads] == [3, 5]
    assert [len(block) for block in target.costs.neurons] == [5, 9]
    assert (target.heads, target.neurons) == (1, 8)
    assert target_of(budget, shape, shape, 8, 20).budget == pytest.approx(0.4 * whole)


# Which units


def test_within_a_layer_the_best_groups_stay() -> None:
    costs = Costs(((0, 1, 2),), ((0, 1, 2, 3),), group=2)
    scores = Scores([torch.tensor([0.2, 0.9])], [torch.tensor([9.0, 1.0, 5.0, 1.0, 8.0, 1.0])])
    (keep,) = keep_best_sum(scores, Target(costs, 3), normalise=False)
    assert keep.heads == (1,)
    assert keep.neurons == (0, 1, 2, 4)


def test_only_what_is_not_in_one_unit_is_normalised() -> None:
    costs = Costs(((0, 1, 2), (0, 1, 2)), ((0, 1, 2), (0, 1, 2)))
    heads = [torch.tensor([4.0, 1.0]), torch.tensor([3.0, 2.5])]
    neurons = [torch.tensor([6.0, 0.5]), torch.tensor([2.0, 1.9])]
    target = Target(costs, 6)

    def counts(factor: float, normalise: bool) -> list[tuple[int, int]]:
        scaled = Scores([heads[0] * factor, heads[1]], [neurons[0], neurons[1] / factor])
        return [(len(k.heads), len(k.neurons)) for k in keep_best_sum(scaled, target, normalise)]

    assert counts(1, True) == counts(1e6, True) == counts(1e-6, True) == [(1, 1), (2, 2)]
    assert counts(1e6, False) == [(2, 1), (2, 1)]


def test_blocks_die_only_where_they_may() -> None:
    shape = shape_from("bert", layers=2)
    scores = Scores([torch.zeros(4), torch.ones(4)], [torch.zeros(64), torch.ones(64)])
    alive, dead = (
        keep_best_sum(scores, target_of(Budget(macs=0.5), shape, shape, 8, 20, empty_blocks=empty), normalise=False)
        for empty in (False, True)
    )
    assert [(len(k.heads), len(k.neurons)) for k in dead] == [(0, 0), (4, 64)]
    assert (len(alive[0].heads), len(alive[0].neurons)) == (1, 8)


def test_a_layer_without_units_stays_without() -> None:
    shape = replace(shape_from("bert", layers=2), layers=(Layer(0, 64), Layer(4, 0)))
    scores = Scores([torch.ones(0), torch.ones(4)], [torch.ones(64), torch.ones(0)])
    keep = keep_best_sum(scores, target_of(Budget(parameters=0.6), shape, shape, 8, 20), normalise=True)
    assert keep[0].heads == keep[1].neurons == ()
    assert len(keep[0].neurons) >= 8
    assert len(keep[1].heads) >= 1


# The options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "this one gives none"),
        ({"macs": 0.5, "latency": 0.5}, "this one gives `macs` and `latency`"),
        ({"macs": 0.5, "batch_size": 1}, "`batch_size` is only for a `latency`"),
        ({"parameters": 1.0}, "less than 1"),
        ({"latency": 0.0}, "greater than 0"),
        ({"flops": 0.5}, "unknown key 'flops'"),
    ],
)
def test_a_budget_is_one_share(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Budget.model_validate(options)
