"""Decides how many heads and neurons each layer keeps, and which: by a share, or under a budget.

Each of the three allocators keeps the best units of a layer. They differ in how layers compete:

- `keep_share`: each layer keeps the same share, or all layers are ranked together.
- `keep_best_sum`: the kept scores have the largest sum that the budget allows (`knapsack.py`, exact).
- `keep_highest`: units are taken in the order of their scores as long as the budget has room. Learned masks need it:
  their scores are probabilities or ranks, which do not add up, and it is fast enough for every step.

The exact sum cannot replace the rankings without changing results: a ranking keeps a unit of score 0 if there is room,
a sum does not; and a sum prefers cheap units, a ranking those of high scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.pruning.costs import Target
from hfcompress.pruning.knapsack import solve_knapsack
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.criteria.base import Scores


# Counts from shares; no torch


def count_kept(units: int, share_cut: float, multiple: int = 1) -> int:
    """Counts the units that stay, rounded to a multiple; at least one multiple if there are any units."""
    if share_cut == 0 or units == 0:
        return units
    groups = units / multiple
    return max(round(groups * (1 - share_cut)), 1) * multiple


def count_by_layer(units: list[int], share_cut: float, multiple: int, even: bool) -> list[int]:
    """Counts the units that stay in each layer; if layers compete, only the sum is exact, the layers are a guess."""
    if even or share_cut == 0 or not units:
        return [count_kept(n, share_cut, multiple) for n in units]
    groups = max(count_kept(sum(units), share_cut, multiple) // multiple, len(units))
    each, more = divmod(groups, len(units))
    return [(each + (i < more)) * multiple for i in range(len(units))]


# Allocators


def keep_share(scores: list[Tensor], share_cut: float, multiple: int, even: bool) -> list[tuple[int, ...]]:
    """Selects the units that stay in each layer, ascending, when a share is cut.

    Args:
        scores: One tensor for each layer's weights.
        share_cut: The share of the units to cut, in [0, 1).
        multiple: The number of units that are kept or cut together.
        even: True to cut the same share of each layer. False to rank the groups of all layers together by the sum of
            their scores, after each layer's scores are divided by their norm (Michel et al. 2019); each layer keeps a
            group.
    """
    counts = count_by_layer([len(s) for s in scores], share_cut, multiple, even)
    if not even and share_cut:
        blocks = [_rank_by_norm(s, multiple) for s in scores]
        room = sum(counts) // multiple - sum(block.least for block in blocks)
        counts = [n * multiple for n in _fill_budget(blocks, room)]
    return [select_best_units(s, n) for s, n in zip(scores, counts, strict=True)]


def keep_best_sum(scores: Scores, target: Target, normalise: bool) -> list[Keep]:
    """Selects the heads and neurons whose scores have the largest sum that a budget allows; the exact optimum.

    Within a layer the best units stay. The choice depends on `scores` alone, so one scoring serves many budgets.

    Args:
        scores: The scores of a criterion.
        target: The budget and the costs of units; neurons are kept in groups of `target.costs.group`.
        normalise: True to divide each block's scores by their sum, for scores that cannot be compared over layers,
            heads and neurons (`Criterion.comparable`). Those of `fisher` and `obs` can: they are increases of a loss or
            an error, which add up over units. Those of `taylor` cannot: first-order changes of the loss cancel out, the
            more units there are. (After division by the Euclidean norm, as in a ranking of heads alone, a block would
            be worth more the more units it has, and heads would lose against neurons by their number alone.)

    Raises:
        HfcompressError: if the units that must stay cost more than the budget.
    """
    from hfcompress.models.surgery import Keep

    heads = [_cumulative_values(s, 1, normalise) for s in scores.heads]
    neurons = [_cumulative_values(s, target.costs.group, normalise) for s in scores.neurons]
    counts = solve_budget(heads, neurons, target)
    layers = zip(scores.heads, scores.neurons, *counts, strict=True)
    return [Keep(select_best_units(head, h), select_best_units(neuron, n)) for head, neuron, h, n in layers]


def keep_highest(heads: Sequence[Tensor], neurons: Sequence[Tensor], target: Target) -> list[Keep]:
    """Selects the units with the highest scores for which a budget has room.

    Heads and groups of neurons of all layers are ranked together, a group by its mean score. A group holds neurons of
    one layer that are neighbours in rank. The units that every layer must keep are paid first, then the others from the
    highest score down. A unit that costs more than is left is skipped, with all units behind it in its layer.

    Args:
        heads, neurons: Scores, one tensor for each layer's weights.
        target: The costs and the budget.
    """
    from hfcompress.models.surgery import Keep

    costs, least = target.costs, target.least
    blocks = [_rank_by_mean(*block, 1) for block in zip(heads, costs.heads, least[0], strict=True)]
    blocks += [_rank_by_mean(*block, costs.group) for block in zip(neurons, costs.neurons, least[1], strict=True)]
    paid = sum(cost[block.least] for cost, block in zip((*costs.heads, *costs.neurons), blocks, strict=True))
    counts = _fill_budget(blocks, target.budget - costs.fixed - paid)
    best = [select_best_units(s, n) for s, n in zip(heads, counts, strict=False)]
    grouped = zip(neurons, counts[len(heads) :], strict=True)
    return [Keep(h, select_best_units(s, n * costs.group)) for h, (s, n) in zip(best, grouped, strict=True)]


def select_best_units(scores: Tensor, count: int) -> tuple[int, ...]:
    """Selects the units with the highest scores, ascending; of equal scores the first."""
    order = scores.detach().float().argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


# The exact sum


def solve_budget(
    values_heads: Sequence[Sequence[float]], values_neurons: Sequence[Sequence[float]], target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Finds the counts of each block with the largest sum of values that the budget allows; the exact optimum.

    Args:
        values_heads: For each layer's weights, the value of keeping its best 0, 1, 2, … head groups.
        values_neurons: For each layer's weights, the value of keeping its best 0, 1, 2, … groups of neurons.
        target: The costs, the budget, and the fewest units that each layer keeps.

    Returns:
        The head groups and the neurons (not groups of neurons) that each layer keeps. Of choices with the same value it
        is the cheapest.

    Raises:
        HfcompressError: if the units that must stay cost more than the budget.
    """
    costs, (least_heads, least_groups) = target.costs, target.least
    blocks, least = (*costs.heads, *costs.neurons), (*least_heads, *least_groups)
    counts = solve_knapsack((*values_heads, *values_neurons), blocks, least, target.budget - costs.fixed)
    if counts is None:
        smallest = costs.fixed + sum(min(block[low:]) for block, low in zip(blocks, least, strict=True))
        raise HfcompressError(
            f"the budget is {target.budget / costs.whole:.4f} of the whole, and what must stay costs "
            f"{smallest / costs.whole:.4f} of it",
            f"give a budget of at least {math.ceil(smallest / costs.whole * 1e4) / 1e4:.4f}, or cut whole blocks too",
        )
    heads, groups = counts[: len(costs.heads)], counts[len(costs.heads) :]
    return tuple(heads), tuple(count * costs.group for count in groups)


def _cumulative_values(scores: Tensor, group: int, normalise: bool) -> list[float]:
    """Computes the values of keeping the best 0, 1, 2, … groups of units."""
    ordered = scores.double().cpu().sort(descending=True).values
    if normalise:
        ordered = ordered / ordered.abs().sum().clamp(min=1e-300)
    return [0.0, *ordered.reshape(-1, group).sum(-1).cumsum(0).tolist()]


# Rankings


@dataclass(frozen=True)
class _RankedGroups:
    """The groups of one block, the best first.

    Attributes:
        least: The number of groups that stay in any case.
        values: The scores by which the others are ranked, `(groups - least,)`.
        prices: The costs of the others, `(groups - least,)`.
    """

    least: int
    values: Tensor
    prices: Tensor


def _rank_by_norm(scores: Tensor, multiple: int) -> _RankedGroups:
    """Ranks groups by the sum of their scores after division by the layer's norm; each costs 1, and one stays."""
    scaled = (scores.float() / scores.float().norm().clamp(min=1e-20)).sort(descending=True).values
    values = scaled.reshape(-1, multiple).sum(-1).double().cpu()
    least = min(len(values), 1)
    return _RankedGroups(least, values[least:], values.new_ones(len(values) - least))


def _rank_by_mean(scores: Tensor, cost: Sequence[float], least: int, group: int) -> _RankedGroups:
    """Ranks groups by their mean score; `cost` holds the costs of keeping 0, 1, 2, … of them."""
    ordered = scores.detach().double().cpu().sort(descending=True).values[: group * (len(cost) - 1)]
    values = ordered.reshape(-1, group).mean(-1)
    return _RankedGroups(least, values[least:], values.new_tensor(cost).diff()[least:])


def _fill_budget(blocks: Sequence[_RankedGroups], room: float) -> list[int]:
    """Takes groups in the order of their values while there is room, and counts those of each block."""
    import torch

    values = torch.cat([block.values for block in blocks])
    order = values.argsort(descending=True, stable=True)
    prices = torch.cat([block.prices for block in blocks])[order]
    owners = torch.cat([torch.full((len(b.values),), i) for i, b in enumerate(blocks)])[order]
    taken = torch.ones(len(order), dtype=torch.bool)
    room += 1e-9 * abs(room)  # sums are rounded
    while len(too_dear := ((prices * taken).cumsum(0) * taken > room).nonzero()):
        first = int(too_dear[0])
        taken[first:] &= owners[first:] != owners[first]
    counts = torch.bincount(owners[taken], minlength=len(blocks))
    return [block.least + int(count) for block, count in zip(blocks, counts, strict=True)]
