"""The best choice of one option a block under a budget, found exactly (the multiple-choice knapsack problem).

Three steps, none of which loses the optimum: blocks whose units all cost the same and are worth less and less are one
ranking; a Lagrange multiplier bounds what any choice can reach, which rules out most options (Sinha & Zoltners 1979);
what is left is combined block by block, of the partial choices only those kept that no other one beats in both cost
and value (Pisinger 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

HALVINGS = 60
"""Of the interval that the multiplier is looked for in; fewer only rule out less."""


@dataclass(frozen=True)
class Block:
    """What keeping the least number of a block's units, one more, two more, … is worth and costs: `(options,)`."""

    values: NDArray[Any]
    costs: NDArray[Any]


@dataclass(frozen=True)
class Options:
    """What one block, or several that were merged, can be, cheapest first.

    Attributes:
        costs, values: `(options,)`, both strictly ascending: what costs more and is worth no more is left out.
        counts: `(options, blocks)`, units of each block at each option; zero where the block has no part in it.
    """

    costs: NDArray[Any]
    values: NDArray[Any]
    counts: NDArray[Any]

    def at(self, index: NDArray[Any]) -> Options:
        """Some of the options."""
        return Options(self.costs[index], self.values[index], self.counts[index])


def best_counts(
    values: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], least: Sequence[int], budget: float
) -> list[int] | None:
    """How many units of each block to keep, so that their values' sum is the largest that the budget allows.

    Of choices worth the same the cheapest is taken, then always the same one.

    Args:
        values: For each block, the value of keeping 0, 1, 2, … units.
        costs: For each block, the cost of keeping as many; in any relation to their number.
        least: For each block, the fewest units that it keeps.
        budget: The most that all costs together may come to.

    Returns:
        One count for each block, or None where even the cheapest choice costs more than the budget.
    """
    import numpy as np

    budget += 1e-13 * abs(budget)  # sums of fractions depend on their order; those of whole numbers do not
    if sum(min(c[low:]) for c, low in zip(costs, least, strict=True)) > budget:
        return None
    blocks = [
        Block(np.array(v[m:], float), np.array(c[m:], float)) for v, c, m in zip(values, costs, least, strict=True)
    ]
    parts, spare, price = _promising(_merged(blocks), budget)
    chosen = _combined(parts, spare, price, budget)
    return [int(count) + low for count, low in zip(chosen, least, strict=True)]


def _merged(blocks: list[Block]) -> list[Options]:
    """The blocks' options; those of blocks that can be ranked unit by unit are put together."""
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
    parts += [_ranking(price, members, blocks) for price, members in ranked.items()]
    return [part.at(_front(part.costs, part.values)) for part in parts]


def _ranking(price: float, members: list[int], blocks: list[Block]) -> Options:
    """The options of blocks whose units all cost `price`: none of them, the best of all, the best two, and so on."""
    import numpy as np

    gains = np.concatenate([np.diff(blocks[m].values) for m in members])
    owners = np.repeat(members, [len(blocks[m].values) - 1 for m in members])
    order = np.argsort(-gains, kind="stable")
    counts = np.zeros((len(order) + 1, len(blocks)), np.int32)
    counts[np.arange(1, len(order) + 1), owners[order]] = 1
    costs = sum(blocks[m].costs[0] for m in members) + price * np.arange(len(order) + 1)
    values = sum(blocks[m].values[0] for m in members) + np.concatenate([[0.0], np.cumsum(gains[order])])
    return Options(costs, values, np.cumsum(counts, axis=0, dtype=np.int32))


def _front(costs: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Where nothing else costs no more and is worth as much, by ascending cost."""
    import numpy as np

    order = np.lexsort((-values, costs))
    best = np.maximum.accumulate(values[order])
    return order[np.concatenate([[True], best[1:] > best[:-1]])]


def _promising(parts: list[Options], budget: float) -> tuple[list[Options], float, float]:
    """The options that a choice as good as one already found can have.

    With a price on each unit of cost, no choice is worth more than `price·budget + Σ max(value - price·cost)`. An
    option that falls short of its block's maximum by more than that bound exceeds a choice already found is in no
    better one.

    Returns:
        The options, how far all of a choice together may fall short, and the price.
    """
    import numpy as np

    price = _price(parts, budget)
    picked = [int((part.values - price * part.costs).argmax()) for part in parts]
    left = budget - sum(float(part.costs[i]) for part, i in zip(parts, picked, strict=True))
    value = sum(float(part.values[i]) for part, i in zip(parts, picked, strict=True))
    spare = price * left - _filled(parts, picked, left)
    spare = max(spare, 0.0) + 1e-9 * (abs(value) + price * budget)  # sums are rounded
    return [part.at(np.flatnonzero(_short(part, price) <= spare)) for part in parts], spare, price


def _short(part: Options, price: float) -> NDArray[Any]:
    """How far each option falls short of the best one at a price."""
    worth = part.values - price * part.costs
    return worth.max() - worth


def _price(parts: list[Options], budget: float) -> float:
    """About the lowest price at which the blocks' best options, each by itself, fit the budget."""
    import numpy as np

    low, high = 0.0, 2 * max(float((np.diff(p.values) / np.diff(p.costs)).max(initial=0.0)) for p in parts)
    price = low
    for _ in range(HALVINGS):
        cost = sum(float(part.costs[(part.values - price * part.costs).argmax()]) for part in parts)
        low, high = (price, high) if cost > budget else (low, price)
        price = (low + high) / 2
    return high


def _filled(parts: list[Options], picked: list[int], left: float) -> float:
    """How much value a choice gains when what it leaves of the budget is spent, each time where it is worth most."""
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


def _combined(parts: list[Options], spare: float, price: float, budget: float) -> NDArray[Any]:
    """The counts of the best choice: block by block, every partial choice that may still become it."""
    import numpy as np

    parts = sorted(parts, key=lambda part: len(part.costs))
    cheapest = [float(part.costs[0]) for part in parts]
    states = Options(np.zeros(1), np.zeros(1), np.zeros_like(parts[0].counts[:1]))
    short = np.zeros(1)
    for number, part in enumerate(parts):
        reserved = sum(cheapest[number + 1 :])
        costs = states.costs[:, None] + part.costs
        shorts = short[:, None] + _short(part, price)
        state, option = np.nonzero((costs + reserved <= budget) & (shorts <= spare))
        costs, values = costs[state, option], states.values[state] + part.values[option]
        front = _front(costs, values)
        short = shorts[state[front], option[front]]
        counts = states.counts[state[front]] + part.counts[option[front]]
        states = Options(costs[front], values[front], counts)
    return states.counts[-1]
