"""Decides which candidates are tried next: a pure function of the outcomes so far.

So a search that was killed goes on as if it had not been, and several workers try what one would.

Quality falls and speed rises as fewer MACs stay, so each question has one answer on the ladder `MACS`: the lowest rung
that still holds.

1. Every backend quantizes the whole model. The fastest one that holds makes all graphs from then on.
2. The vocabulary of the data is tried, and kept if it costs next to nothing.
3. Without training: the lowest rung that holds is found by bisection.
4. With 150, then 600, then 2,400 steps of recovery: from the rung below, downwards as long as rungs hold. A rung that
   is far out of reach with fewer steps is left out.
5. A point between the lowest rung that holds and the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from hfcompress.searching.candidate import MACS, Candidate
from hfcompress.searching.outcome import Outcome, score

if TYPE_CHECKING:
    from hfcompress.recipe.target import Target

REACH = 4.0
"""Four times the steps are tried on a rung whose loss is at most this many times the accepted one."""
CHEAP = 0.1
"""The share of the accepted loss that the smaller vocabulary may cost."""


def propose(
    outcomes: Sequence[Outcome], target: Target, backends: Sequence[str], steps: Sequence[int]
) -> list[Candidate]:
    """Lists the candidates to try next, which may run side by side; empty once the plan is done.

    Args:
        outcomes: All trials so far; one that failed counts as one that does not hold.
        target: The limits and the goal.
        backends: The backends to try.
        steps: The numbers of steps of a recovery, from 0 up.
    """
    known = {outcome.candidate: outcome for outcome in outcomes}
    plain = [Candidate(backend) for backend in backends]
    if missing := [candidate for candidate in plain if candidate not in known]:
        return missing
    best = _choose_plain([known[candidate] for candidate in plain], target)
    if best is None:
        return []
    small = replace(best.candidate, vocabulary="corpus")
    if small not in known:
        return [small]
    start = small if _is_cheap(best, known[small], target) else best.candidate
    return _walk_ladder(start, known, target, steps)


def _choose_plain(outcomes: Sequence[Outcome], target: Target) -> Outcome | None:
    """The quantized whole model that later candidates are made like: the best one that holds, else that loses least."""
    measured = [outcome for outcome in outcomes if score(outcome, target) is not None]
    holding = [outcome for outcome in measured if outcome.holds]
    if holding:
        return max(holding, key=lambda x: (score(x, target), x.candidate))
    return min(measured, key=lambda x: (x.drop, x.candidate), default=None)


def _is_cheap(before: Outcome, after: Outcome, target: Target) -> bool:
    if after.drop is None or before.drop is None or (before.holds and not after.holds):
        return False
    return after.drop - before.drop <= CHEAP * target.max_drop.value


def _walk_ladder(
    start: Candidate, known: dict[Candidate, Outcome], target: Target, lengths: Sequence[int]
) -> list[Candidate]:
    def at(rung: int, steps: int) -> Candidate:
        return replace(start, macs=MACS[rung], steps=steps)

    def holds(candidate: Candidate) -> bool:
        return candidate in known and known[candidate].holds

    # Without training, by bisection. The whole model counts as holding: training may repair what rounding costs.
    low, high = 0, len(MACS)
    while high - low > 1:
        middle = (low + high) // 2
        candidate = at(middle, lengths[0])
        if candidate not in known:
            return [candidate]
        low, high = (middle, high) if holds(candidate) else (low, middle)
    deepest = at(low, lengths[0])
    for fewer, steps in pairwise(lengths):
        while low + 1 < len(MACS):
            candidate = at(low + 1, steps)
            if candidate not in known:
                if _is_out_of_reach(known.get(at(low + 1, fewer)), target):
                    break
                return [candidate]
            if not holds(candidate):
                break
            low, deepest = low + 1, candidate
    between = _make_between(deepest, low, lengths[-1])
    return [between] if between is not None and between not in known else []


def _is_out_of_reach(outcome: Outcome | None, target: Target) -> bool:
    """True if a rung lost so much with fewer steps that more of them are unlikely to repair it."""
    if outcome is None or outcome.error:
        return False
    return outcome.least is not None and outcome.least > REACH * target.max_drop.value


def _make_between(deepest: Candidate, rung: int, most: int) -> Candidate | None:
    """The candidate with the steps of the deepest one, halfway to the next rung."""
    if rung + 1 >= len(MACS):
        return None
    steps = deepest.steps or most
    return replace(deepest, macs=round(math.sqrt(MACS[rung] * MACS[rung + 1]), 3), steps=steps)
