"""Decides how many heads and neurons each layer keeps, and which: by a share, or under a budget.

All three allocators keep the best units of a layer; they differ in how layers compete.

- `keep_share`: each layer keeps the same share, or all layers are ranked together.
- `keep_best_sum`: the scores that are kept have the largest sum that a budget allows (`knapsack.py`, exact).
- `keep_highest`: units are taken in the order of their scores as long as a budget has room. Masks that are learned need
  it: their scores are probabilities or ranks, which do not add up, and it has to be fast enough for every step.

The exact sum can replace neither of the rankings without changing results: a unit that scores nothing is kept by a
ranking that has room for it and left out by a sum, and a sum prefers cheap units, a ranking high ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.pruning.costs import Target
from hfcompress.pruning.knapsack import best_counts
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.criteria.base import Scores


# Counts from shares; no torch


def count_kept(units: int, share_cut: float, multiple: int = 1) -> int:
    """The nearest multiple to the units that stay; at least one multiple where there are any units."""
    if share_cut == 0 or units == 0:
        return units
    groups = units / multiple
    return max(round(groups * (1 - share_cut)), 1) * multiple


def count_by_layer(units: list[int], share_cut: float, multiple: int, even: bool) -> list[int]:
    """Counts the units that stay in each layer; for a common ranking the sum is exact, its spread a guess."""
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
        multiple: Units stay or go in groups of so many.
        even: True to cut the same share of each layer. Otherwise groups of all layers are ranked together by the sum of
            their scores, each layer's scores divided by their norm (Michel et al. 2019); each layer keeps a group.
    """
    counts = count_by_layer([len(s) for s in scores], share_cut, multiple, even)
    if not even and share_cut:
        blocks = [_ranked_by_norm(s, multiple) for s in scores]
        room = sum(counts) // multiple - sum(block.least for block in blocks)
        counts = [n * multiple for n in _fill(blocks, room)]
    return [best_units(s, n) for s, n in zip(scores, counts, strict=True)]


def keep_best_sum(scores: Scores, target: Target, normalise: bool) -> list[Keep]:
    """Selects the heads and neurons whose scores have the largest sum that a budget allows; the exact optimum.

    Within a layer the best stay. Nothing but `scores` is looked at, so one scoring serves any number of budgets.

    Args:
        scores: What the criterion says.
        target: The budget, and what units cost; neurons go in groups of `target.costs.group`.
        normalise: For scores that are not in one unit over layers, heads and neurons (`Criterion.comparable`): each
            block's scores are divided by their sum. Those of `fisher` and `obs` are in one unit: they say how much a
            loss or an error would rise, and a sum of them says it of many units. `taylor`'s are not: what single
            units do to the loss to first order cancels out, the more the more units there are. (Divided by their
            Euclidean norm, as a ranking of heads among heads does it, a block would be worth more the more units it
            has, and heads would lose against neurons by their number alone.)

    Raises:
        HfcompressError: if the least that must stay costs more than the budget.
    """
    from hfcompress.models.surgery import Keep

    heads = [_cumulative_values(s, 1, normalise) for s in scores.heads]
    neurons = [_cumulative_values(s, target.costs.group, normalise) for s in scores.neurons]
    counts = solve_budget(heads, neurons, target)
    layers = zip(scores.heads, scores.neurons, *counts, strict=True)
    return [Keep(best_units(head, h), best_units(neuron, n)) for head, neuron, h, n in layers]


def keep_highest(heads: Sequence[Tensor], neurons: Sequence[Tensor], target: Target) -> list[Keep]:
    """Selects the units of the highest scores that a budget has room for.

    Heads and groups of neurons are ranked together over all layers, a group by its mean score; within a layer the
    groups are of neighbours in rank. The highest come first. A unit that is too dear for the room that is left is
    passed over, with those behind it in its layer. What every layer keeps is paid before all else.

    Args:
        heads, neurons: Scores, one tensor for each layer's weights.
        target: The costs and the budget.
    """
    from hfcompress.models.surgery import Keep

    costs, least = target.costs, target.least
    blocks = [_ranked_by_mean(*block, 1) for block in zip(heads, costs.heads, least[0], strict=True)]
    blocks += [_ranked_by_mean(*block, costs.group) for block in zip(neurons, costs.neurons, least[1], strict=True)]
    paid = sum(cost[block.least] for cost, block in zip((*costs.heads, *costs.neurons), blocks, strict=True))
    counts = _fill(blocks, target.budget - costs.fixed - paid)
    best = [best_units(s, n) for s, n in zip(heads, counts, strict=False)]
    grouped = zip(neurons, counts[len(heads) :], strict=True)
    return [Keep(h, best_units(s, n * costs.group)) for h, (s, n) in zip(best, grouped, strict=True)]


def best_units(scores: Tensor, count: int) -> tuple[int, ...]:
    """The indices of so many best units, ascending; of equal ones the first."""
    order = scores.detach().float().argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


# The exact sum


def solve_budget(
    values_heads: Sequence[Sequence[float]], values_neurons: Sequence[Sequence[float]], target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Finds how much of each block to keep, so that it is worth the most that the budget allows; the exact optimum.

    Args:
        values_heads: For each layer's weights, what keeping its best 0, 1, 2, … head groups is worth.
        values_neurons: For each layer's weights, what keeping its best 0, 1, 2, … groups of neurons is worth.
        target: The costs, the budget and the least that stays.

    Returns:
        Head groups and neurons (not groups of them) that each layer keeps. Of choices worth the same it is the
        cheapest.

    Raises:
        HfcompressError: if the least that must stay costs more than the budget.
    """
    costs, (least_heads, least_groups) = target.costs, target.least
    blocks, least = (*costs.heads, *costs.neurons), (*least_heads, *least_groups)
    counts = best_counts((*values_heads, *values_neurons), blocks, least, target.budget - costs.fixed)
    if counts is None:
        smallest = costs.fixed + sum(min(block[low:]) for block, low in zip(blocks, least, strict=True))
        raise HfcompressError(
            f"the budget is {target.budget / costs.whole:.4f} of the whole, and the least that must stay is "
            f"{smallest / costs.whole:.4f} of it",
            f"give a budget of at least {math.ceil(smallest / costs.whole * 1e4) / 1e4:.4f}, or let blocks go whole",
        )
    heads, groups = counts[: len(costs.heads)], counts[len(costs.heads) :]
    return tuple(heads), tuple(count * costs.group for count in groups)


def _cumulative_values(scores: Tensor, group: int, normalise: bool) -> list[float]:
    """What keeping the best 0, 1, 2, … groups of units is worth."""
    ordered = scores.double().cpu().sort(descending=True).values
    if normalise:
        ordered = ordered / ordered.abs().sum().clamp(min=1e-300)
    return [0.0, *ordered.reshape(-1, group).sum(-1).cumsum(0).tolist()]


# Rankings


@dataclass(frozen=True)
class _Ranked:
    """The groups of one block, the best first.

    Attributes:
        least: Groups that stay in any case.
        values: What the others are ranked by, `(groups - least,)`.
        prices: What each of the others costs, `(groups - least,)`.
    """

    least: int
    values: Tensor
    prices: Tensor


def _ranked_by_norm(scores: Tensor, multiple: int) -> _Ranked:
    """Groups by the sum of their scores, which are divided by the layer's norm; each costs 1, and one stays."""
    scaled = (scores.float() / scores.float().norm().clamp(min=1e-20)).sort(descending=True).values
    values = scaled.reshape(-1, multiple).sum(-1).double().cpu()
    least = min(len(values), 1)
    return _Ranked(least, values[least:], values.new_ones(len(values) - least))


def _ranked_by_mean(scores: Tensor, cost: Sequence[float], least: int, group: int) -> _Ranked:
    """Groups by their mean score; `cost` is that of keeping 0, 1, 2, … of them."""
    ordered = scores.detach().double().cpu().sort(descending=True).values[: group * (len(cost) - 1)]
    values = ordered.reshape(-1, group).mean(-1)
    return _Ranked(least, values[least:], values.new_tensor(cost).diff()[least:])


def _fill(blocks: Sequence[_Ranked], room: float) -> list[int]:
    """Counts the groups of each block that there is room for, taken in the order of their values."""
    import torch

    values = torch.cat([block.values for block in blocks])
    order = values.argsort(descending=True, stable=True)
    prices = torch.cat([block.prices for block in blocks])[order]
    owners = torch.cat([torch.full((len(b.values),), i) for i, b in enumerate(blocks)])[order]
    taken = torch.ones(len(order), dtype=torch.bool)
    room += 1e-9 * abs(room)  # sums are rounded
    while len(dear := ((prices * taken).cumsum(0) * taken > room).nonzero()):
        first = int(dear[0])
        taken[first:] &= owners[first:] != owners[first]
    counts = torch.bincount(owners[taken], minlength=len(blocks))
    return [block.least + int(count) for block, count in zip(blocks, counts, strict=True)]
