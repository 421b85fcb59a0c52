"""Solves the multiple-choice knapsack problem exactly: chooses one option for each block under a budget.

There are three steps, and none of them loses the optimum. Blocks whose units all have the same cost and falling values
are merged into one ranking. A Lagrange multiplier bounds the value of any choice, which rules out most options (Sinha &
Zoltners 1979). The rest is combined block by block; a partial choice is kept only if no other one has both a lower cost
and a higher value (Pisinger 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALVINGS = 60
"""Halvings of the search interval for the multiplier; with fewer of them, fewer options are ruled out."""


@dataclass(frozen=True)
class Block:
    """The values and costs of keeping a block's least number of units, one more, two more, …: `(options,)`."""

    values: NDArray[Any]
    costs: NDArray[Any]


@dataclass(frozen=True)
class Options:
    """The options of one block, or of several merged blocks, the cheapest first.

    Attributes:
        costs, values: `(options,)`, both strictly ascending: an option that costs more is worth more.
        counts: `(options, blocks)`, the units of each block in each option; 0 for other blocks.
    """

    costs: NDArray[Any]
    values: NDArray[Any]
    counts: NDArray[Any]

    def at(self, index: NDArray[Any]) -> Options:
        """Selects some of the options."""
        return Options(self.costs[index], self.values[index], self.counts[index])


def solve_knapsack(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], least: Sequence[int], budget: float
) -> list[int] | None:
    """Finds the number of units of each block with the largest sum of values that the budget allows.

    Of choices with the same value it takes the cheapest, and is deterministic.

    Args:
        values: For each block, the value of keeping 0, 1, 2, … units.
        costs: For each block, the cost of keeping 0, 1, 2, … units; any numbers, not only ascending ones.
        least: For each block, the fewest units that it keeps.
        budget: The largest sum of all costs.

    Returns:
        One count for each block, or None if even the cheapest choice costs more than the budget.
    """
    import numpy as np

    budget += 1e-13 * abs(budget)  # sums of fractions depend on their order; those of whole numbers do not
    if sum(min(c[low:]) for c, low in zip(costs, least, strict=True)) > budget:
        return None
    blocks = [
        Block(np.array(v[m:], float), np.array(c[m:], float)) for v, c, m in zip(values, costs, least, strict=True)
    ]
    parts, spare, price = _select_promising(_merge_blocks(blocks), budget)
    chosen = _combine_parts(parts, spare, price, budget)
    return [int(count) + low for count, low in zip(chosen, least, strict=True)]


def _merge_blocks(blocks: list[Block]) -> list[Options]:
    """Makes the blocks' options; blocks that can be ranked unit by unit are merged."""
    import numpy as np

    ranked: dict[float, list[int]] = {}
    parts = []
    for index, block in enumerate(blocks):
        gains, prices = np.diff(block.values), np.diff(block.costs)
        if len(gains) and prices[0] > 0 and (prices == prices[0]).all() and (np.diff(gains) <= 0).all():
            ranked.setdefault(float(prices[0]), []).append(index)
        else:
            counts = np.zeros((len(block.values), len(blocks)), np.int32)
            counts[:, index] = np.arange(len(block.values))
            parts.append(Options(block.costs, block.values, counts))
    parts += [_rank_units(price, members, blocks) for price, members in ranked.items()]
    return [part.at(_select_front(part.costs, part.values)) for part in parts]


def _rank_units(price: float, members: list[int], blocks: list[Block]) -> Options:
    """Makes the options of blocks whose units all cost `price`: no unit, the best one, the best two, and so on."""
    import numpy as np

    gains = np.concatenate([np.diff(blocks[m].values) for m in members])
    owners = np.repeat(members, [len(blocks[m].values) - 1 for m in members])
    order = np.argsort(-gains, kind="stable")
    counts = np.zeros((len(order) + 1, len(blocks)), np.int32)
    counts[np.arange(1, len(order) + 1), owners[order]] = 1
    costs = sum(blocks[m].costs[0] for m in members) + price * np.arange(len(order) + 1)
    values = sum(blocks[m].values[0] for m in members) + np.concatenate([[0.0], np.cumsum(gains[order])])
    return Options(costs, values, np.cumsum(counts, axis=0, dtype=np.int32))


def _select_front(costs: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Selects the options that no other option beats in both cost and value, by ascending cost (the Pareto front)."""
    import numpy as np

    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def _select_promising(parts: list[Options], budget: float) -> tuple[list[Options], float, float]:
    """Selects the options that can be part of a choice at least as good as one that is already known.

    With a price for each unit of cost, no choice is worth more than `price·budget + Σ max(value - price·cost)`. The
    difference between this bound and the known choice is the spare. An option that falls short of its block's maximum
    by more than the spare cannot be part of a better choice.

    Returns:
        The options, the spare, and the price.
    """
    import numpy as np

    price = _find_price(parts, budget)
    picked = [int((part.values - price * part.costs).argmax()) for part in parts]
    left = budget - sum(float(part.costs[i]) for part, i in zip(parts, picked, strict=True))
    value = sum(float(part.values[i]) for part, i in zip(parts, picked, strict=True))
    spare = price * left - _fill_greedily(parts, picked, left)
    spare = max(spare, 0.0) + 1e-9 * (abs(value) + price * budget)  # sums are rounded
    return [part.at(np.flatnonzero(_shortfall(part, price) <= spare)) for part in parts], spare, price


def _shortfall(part: Options, price: float) -> NDArray[Any]:
    """Computes by how much each option falls short of the best one at a price."""
    worth = part.values - price * part.costs
    return worth.max() - worth


def _find_price(parts: list[Options], budget: float) -> float:
    """Finds roughly the lowest price at which the best options of all blocks fit the budget together."""
    import numpy as np

    low, high = 0.0, 2 * max(float((np.diff(p.values) / np.diff(p.costs)).max(initial=0.0)) for p in parts)
    price = low
    for _ in range(HALVINGS):
        cost = sum(float(part.costs[(part.values - price * part.costs).argmax()]) for part in parts)
        low, high = (price, high) if cost > budget else (low, price)
        price = (low + high) / 2
    return high


def _fill_greedily(parts: list[Options], picked: list[int], left: float) -> float:
    """Computes the value that a choice gains if the rest of the budget is spent, each time on the largest gain."""
    import numpy as np

    picked, gained = list(picked), 0.0
    while True:
        reach = [
            int(np.searchsorted(p.costs, p.costs[i] + left, "right")) - 1 for p, i in zip(parts, picked, strict=True)
        ]
        gains = [float(p.values[j] - p.values[i]) for p, i, j in zip(parts, picked, reach, strict=True)]
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            return gained
        gained += gains[best]
        left -= float(parts[best].costs[reach[best]] - parts[best].costs[picked[best]])
        picked[best] = reach[best]


def _combine_parts(parts: list[Options], spare: float, price: float, budget: float) -> NDArray[Any]:
    """Finds the counts of the best choice, block by block, from all partial choices that can still become the best."""
    import numpy as np

    parts = sorted(parts, key=lambda part: len(part.costs))
    cheapest = [float(part.costs[0]) for part in parts]
    states = Options(np.zeros(1), np.zeros(1), np.zeros_like(parts[0].counts[:1]))
    short = np.zeros(1)
    for number, part in enumerate(parts):
        reserved = sum(cheapest[number + 1 :])
        costs = states.costs[:, None] + part.costs
        shorts = short[:, None] + _shortfall(part, price)
        state, option = np.nonzero((costs + reserved <= budget) & (shorts <= spare))
        costs, values = costs[state, option], states.values[state] + part.values[option]
        front = _select_front(costs, values)
        short = shorts[state[front], option[front]]
        counts = states.counts[state[front]] + part.counts[option[front]]
        states = Options(costs[front], values[front], counts)
    return states.counts[-1]
