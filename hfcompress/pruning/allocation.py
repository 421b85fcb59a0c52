"""How many heads and neurons stay in each layer, and which: by a share, or under a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.pruning.costs import Target, solve
from hfcompress.pruning.criteria.base import Scores

if TYPE_CHECKING:
    from torch import Tensor

    from hfcompress.models.surgery import Keep


def kept(units: int, share_cut: float, multiple: int = 1) -> int:
    """How many of a layer's units stay: the nearest multiple, at least one where there are any."""
    if share_cut == 0 or units == 0:
        return units
    groups = units / multiple
    return max(round(groups * (1 - share_cut)), 1) * multiple


def quota(units: list[int], share_cut: float, multiple: int, even: bool) -> list[int]:
    """How many units stay in each layer; where a global ranking decides, the total is exact and its spread is not."""
    if even or share_cut == 0 or not units:
        return [kept(n, share_cut, multiple) for n in units]
    groups = max(kept(sum(units), share_cut, multiple) // multiple, len(units))
    each, more = divmod(groups, len(units))
    return [(each + (i < more)) * multiple for i in range(len(units))]


def choose(scores: list[Tensor], share_cut: float, multiple: int, even: bool) -> list[tuple[int, ...]]:
    """The units that stay in each layer, ascending.

    Within a layer the best stay, in groups of `multiple`. `even` keeps the same share of each layer; otherwise groups
    of all layers are ranked together by the sum of their scores, each layer's scores divided by their norm
    (Michel et al. 2019), at least one group a layer staying.
    """
    counts = quota([len(s) for s in scores], share_cut, multiple, even)
    if not even and share_cut:
        counts = _ranked(scores, sum(counts), multiple)
    return [best(s, n) for s, n in zip(scores, counts, strict=True)]


def allocate(scores: Scores, target: Target, normalise: bool) -> list[Keep]:
    """The heads and neurons that stay under a budget, for which all blocks compete; nothing but `scores` is looked at.

    Of all numbers of heads and neurons that the budget allows, those are taken whose scores have the largest sum;
    within a layer the best stay. One scoring serves any number of budgets.

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
        HfcompressError: where the least that must stay costs more than the budget.
    """
    from hfcompress.models.surgery import Keep

    values = [_values(s, 1, normalise) for s in scores.heads]
    group_values = [_values(s, target.costs.group, normalise) for s in scores.neurons]
    counts = solve(values, group_values, target)
    chosen = zip(scores.heads, scores.neurons, *counts, strict=True)
    return [Keep(best(heads, h), best(neurons, n)) for heads, neurons, h, n in chosen]


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The so many best units, ascending; of equal ones the first."""
    order = scores.float().argsort(descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _values(scores: Tensor, group: int, normalise: bool) -> list[float]:
    """What keeping the best 0, 1, 2, … groups of units is worth."""
    ordered = scores.double().cpu().sort(descending=True).values
    if normalise:
        ordered = ordered / ordered.abs().sum().clamp(min=1e-300)
    return [0.0, *ordered.reshape(-1, group).sum(-1).cumsum(0).tolist()]


def _ranked(scores: list[Tensor], total: int, multiple: int) -> list[int]:
    candidates = []
    for layer, values in enumerate(scores):
        normalised = (values.float() / values.float().norm().clamp(min=1e-20)).sort(descending=True).values
        groups = normalised.reshape(-1, multiple).sum(-1)
        candidates += [(float(value), layer, rank) for rank, value in enumerate(groups)]
    first = [c for c in candidates if c[2] == 0]
    rest = sorted((c for c in candidates if c[2] > 0), key=lambda c: (-c[0], c[1], c[2]))
    counts = [0] * len(scores)
    for _, layer, _ in (first + rest)[: total // multiple]:
        counts[layer] += multiple
    return counts
