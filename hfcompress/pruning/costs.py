"""What it costs to keep heads and neurons, and which to keep under a budget. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hfcompress.pruning.knapsack import best_counts
from hfcompress.utils.errors import HfcompressError


@dataclass(frozen=True)
class Costs:
    """What keeping so many units of each block costs, all in one unit: MACs, parameters, bytes or nanoseconds.

    Attributes:
        heads: For each layer's weights, the cost of keeping 0, 1, 2, … of its head groups.
        neurons: For each layer's weights, the cost of keeping 0, 1, 2, … groups of `group` neurons.
        group: Neurons that stay or go together.
        fixed: What everything else costs.
    """

    heads: tuple[tuple[float, ...], ...]
    neurons: tuple[tuple[float, ...], ...]
    group: int = 1
    fixed: float = 0.0

    @property
    def whole(self) -> float:
        """The cost of keeping everything."""
        return self.fixed + sum(block[-1] for block in (*self.heads, *self.neurons))

    def of(self, heads: tuple[int, ...], neurons: tuple[int, ...]) -> float:
        """The cost of keeping so many head groups and so many neurons of each layer; neurons in whole groups."""
        kept = [block[count] for block, count in zip(self.heads, heads, strict=True)]
        kept += [block[count // self.group] for block, count in zip(self.neurons, neurons, strict=True)]
        return self.fixed + sum(kept)


@dataclass(frozen=True)
class Target:
    """What pruning must come to.

    Attributes:
        costs: What units cost.
        budget: The most that what stays may cost, in the unit of `costs`.
        heads: The fewest head groups that a layer keeps, where it has as many.
        neurons: The fewest neurons that a layer keeps, in whole groups, where it has as many.
    """

    costs: Costs
    budget: float
    heads: int = 1
    neurons: int = 1

    @property
    def least(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The fewest head groups and the fewest neuron groups of each layer."""
        groups = -(-self.neurons // self.costs.group)
        return (
            tuple(min(self.heads, len(block) - 1) for block in self.costs.heads),
            tuple(min(groups, len(block) - 1) for block in self.costs.neurons),
        )


def solve(
    values_heads: Sequence[Sequence[float]], values_neurons: Sequence[Sequence[float]], target: Target
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How much to keep of each block, so that it is worth the most that the budget allows; the exact optimum.

    Args:
        values_heads: For each layer's weights, what keeping its best 0, 1, 2, … head groups is worth.
        values_neurons: For each layer's weights, what keeping its best 0, 1, 2, … groups of neurons is worth.
        target: The costs, the budget and the least that stays.

    Returns:
        Head groups and neurons (not groups of them) that each layer keeps. Of choices worth the same it is the
        cheapest.

    Raises:
        HfcompressError: where the least that must stay costs more than the budget.
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
