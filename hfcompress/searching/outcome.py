"""The outcome of a trial: what was measured of a candidate, and whether it keeps to the limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.searching.candidate import Candidate

if TYPE_CHECKING:
    from hfcompress.recipe.target import Target


@dataclass(frozen=True)
class Outcome:
    """What was measured of a candidate on the dev split and on this machine.

    Attributes:
        candidate: The candidate.
        seconds: How long the trial took.
        drop: The loss of quality that was seen, in the unit of `max_drop`; None for a trial that failed.
        least, largest: The least and the largest loss that the rows leave possible.
        holds: True if a loss above `max_drop` is ruled out.
        rows: Rows of the dev split that were asked.
        speedups: The speed-up over the source at each batch size, and the ends of its 95% interval.
        bytes: The size of the weight files.
        layers: Heads and FFN neurons of each layer.
        error: Why the trial failed; empty if it did not.
    """

    candidate: Candidate
    seconds: float
    drop: float | None = None
    least: float | None = None
    largest: float | None = None
    holds: bool = False
    rows: int = 0
    speedups: Mapping[int, Sequence[float]] | None = None
    bytes: int | None = None
    layers: Sequence[tuple[int, int]] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The outcome as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Outcome:
        """Reads what `to_json` wrote."""
        values = dict(found)
        values["candidate"] = Candidate(**values["candidate"])
        speedups = values["speedups"]
        values["speedups"] = None if speedups is None else {int(size): tuple(ends) for size, ends in speedups.items()}
        values["layers"] = tuple((int(heads), int(ffn)) for heads, ffn in values["layers"])
        return cls(**values)

    @property
    def speedup(self) -> float | None:
        """The geometric mean of the speed-ups over the batch sizes; None if one is missing."""
        if not self.speedups:
            return None
        return math.prod(ends[0] for ends in self.speedups.values()) ** (1 / len(self.speedups))


def find_faults(outcome: Outcome, target: Target) -> list[str]:
    """Lists the limits that a model breaks, in words; a figure that is missing breaks its limit."""
    if outcome.error:
        return [f"it failed: {outcome.error}"]
    faults = []
    if not outcome.holds:
        faults.append(f"a loss above {target.max_drop} is not ruled out")
    if target.min_speedup is not None:
        slow = [size for size, ends in (outcome.speedups or {}).items() if ends[0] < target.min_speedup]
        if slow or not outcome.speedups:
            faults.append(f"not {target.min_speedup:g}x faster at batch {', '.join(map(str, slow)) or 'any size'}")
    if target.max_mb is not None and (outcome.bytes is None or outcome.bytes > target.max_mb * 1e6):
        faults.append(f"larger than {target.max_mb:g} MB")
    if score(outcome, target) is None:
        faults.append(f"its {target.goal} was not measured")
    return faults


def score(outcome: Outcome, target: Target) -> float | None:
    """The quantity that the search maximizes; None if it was not measured."""
    if target.goal == "latency":
        return outcome.speedup
    return None if outcome.bytes is None else 1 / outcome.bytes


def choose_best(outcomes: Sequence[Outcome], target: Target) -> Outcome | None:
    """The best model that keeps to all limits; of equal ones the smaller; None if there is none."""
    fit = [outcome for outcome in outcomes if not find_faults(outcome, target)]
    return max(fit, key=lambda x: (score(x, target), -(x.bytes or 0), -x.candidate.steps), default=None)


def choose_nearest(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The attempt that loses least, for a search that found no model within the limits; None if all failed."""
    measured = [outcome for outcome in outcomes if not outcome.error and outcome.largest is not None]
    return min(measured, key=lambda x: (x.largest, x.candidate), default=None)


def list_front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The models that no other one beats in loss, speed and size together; fastest first."""
    measured = [x for x in outcomes if not x.error and x.drop is not None and x.speedup is not None]

    def figures(x: Outcome) -> tuple[float, float, float]:
        assert x.drop is not None
        assert x.speedup is not None
        assert x.bytes is not None
        return -x.drop, x.speedup, -float(x.bytes)

    def beaten(x: Outcome) -> bool:
        own = figures(x)
        return any(all(a >= b for a, b in zip(figures(y), own, strict=True)) and figures(y) != own for y in measured)

    return sorted((x for x in measured if not beaten(x)), key=lambda x: -(x.speedup or 0))
