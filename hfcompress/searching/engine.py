"""Searches: tries candidates until the plan is done or the time is up, then runs the winner's recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hfcompress.report.statistics.power import rows_needed, smallest_margin
from hfcompress.searching.candidate import Candidate
from hfcompress.searching.outcome import Outcome, choose_best, choose_nearest, find_faults, score
from hfcompress.searching.policy import propose
from hfcompress.searching.trials import Trials
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from hfcompress.models.artifact import Artifact
    from hfcompress.recipe.target import Target
    from hfcompress.searching.race import Verdict

RESERVE = 0.1
"""The share of the time that is kept for the last measurement."""
POLL = 0.5
"""Seconds between two looks at what other workers do."""
EXPECTED_DISCORDANCE = 0.06
"""The share of answers that a candidate is expected to change, before any was measured."""


class Maker(Protocol):
    """Makes, judges and times candidates."""

    def make(self, candidate: Candidate) -> Artifact:
        """Makes the model of a candidate."""

    def judge(self, artifact: Artifact) -> Verdict:
        """Bounds the loss of a model."""

    def time(self, artifact: Artifact) -> Mapping[int, Sequence[float]]:
        """Times a model beside the source."""


@dataclass(frozen=True)
class Ending:
    """The end of a search.

    Attributes:
        outcomes: All trials, in their order.
        best: The best model within the limits; None if there is none.
        nearest: The attempt that loses least; None if every trial failed.
        done: True if the plan was carried out, false if the time was up.
        seconds: The time that it took, in earlier calls too.
    """

    outcomes: Sequence[Outcome]
    best: Outcome | None
    nearest: Outcome | None
    done: bool
    seconds: float

    @property
    def chosen(self) -> Outcome | None:
        """The best model, or else the nearest attempt."""
        return self.best or self.nearest


def search(
    maker: Maker,
    trials: Trials,
    target: Target,
    backends: Sequence[str],
    steps: Sequence[int],
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    """Tries candidates until the plan is done or the time is up.

    Args:
        maker: Makes, judges and times candidates.
        trials: The trials so far.
        target: The limits.
        backends: The backends to try.
        steps: The numbers of steps of a recovery, from 0 up.
        clock: Gives the time in seconds.
    """
    budget = target.hours * 3600 * (1 - RESERVE)
    before, start, failed = trials.seconds, clock(), set[Candidate]()

    def spent() -> float:
        return before + clock() - start

    with trials.work():
        while True:
            outcomes = trials.list_outcomes()
            # A trial that failed in an earlier call is tried again, once.
            known = [x for x in outcomes if not x.error or x.candidate in failed]
            wanted = propose(known, target, backends, steps)
            affordable = [c for c in wanted if spent() + estimate_seconds(c, outcomes) <= budget]
            if not affordable:
                break
            claim = trials.claim(affordable, backends)
            if claim is None:  # other workers try them
                time.sleep(POLL)
                continue
            outcome = try_candidate(maker, claim.candidate, clock)
            if outcome.error:
                failed.add(claim.candidate)
            trials.finish(claim, outcome, score(outcome, target))
            trials.seconds = spent()
            log.info(f"search: {describe_outcome(outcome, target)}")
    best = choose_best(outcomes, target)
    return Ending(outcomes, best, choose_nearest(outcomes), not wanted, spent())


def try_candidate(maker: Maker, candidate: Candidate, clock: Callable[[], float]) -> Outcome:
    """Makes, judges and times a candidate; an error becomes its outcome."""
    log.info(f"search: trying {candidate}")
    start = clock()
    try:
        artifact = maker.make(candidate)
        verdict = maker.judge(artifact)
        speedups = maker.time(artifact)
    except HfcompressError as error:
        return Outcome(candidate, clock() - start, error=error.problems[0].message)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        return Outcome(candidate, clock() - start, error=f"{type(error).__name__}: {error}")
    shape = artifact.shape
    return Outcome(
        candidate,
        round(clock() - start, 1),
        verdict.drop,
        verdict.least,
        verdict.largest,
        verdict.holds,
        verdict.rows,
        speedups,
        artifact.disk_bytes,
        tuple((layer.heads, layer.ffn) for layer in shape.layers) if shape else (),
    )


def estimate_seconds(candidate: Candidate, outcomes: Sequence[Outcome]) -> float:
    """Estimates how long a trial takes: as long as those with as many steps; else as those with fewer, and the steps.

    Without any trial so far the estimate is 0: the first one is always tried.
    """
    done = [x for x in outcomes if not x.error]
    same = [x.seconds for x in done if x.candidate.steps == candidate.steps]
    if same:
        return max(same)
    fewer = max((x for x in done if x.candidate.steps < candidate.steps), key=lambda x: x.candidate.steps, default=None)
    if fewer is None:
        return 0.0
    free = min(x.seconds for x in done)
    if not fewer.candidate.steps:
        return fewer.seconds
    return free + (fewer.seconds - free) * candidate.steps / fewer.candidate.steps


def describe_outcome(outcome: Outcome, target: Target) -> str:
    """Describes an outcome in one line."""
    if outcome.error:
        return f"{outcome.candidate}: failed: {outcome.error}"
    assert outcome.drop is not None
    assert outcome.largest is not None
    unit, scale = ("%", 100) if target.max_drop.relative else ("", 1)
    speeds = ", ".join(f"{ends[0]:.1f}x at batch {size}" for size, ends in (outcome.speedups or {}).items())
    faults = find_faults(outcome, target)
    return (
        f"{outcome.candidate}: loss {scale * outcome.drop + 0.0:.3g}{unit} "  # + 0.0: a negative zero reads as a gain
        f"(at most {scale * outcome.largest:.3g}{unit}), "
        f"{speeds}, {(outcome.bytes or 0) / 1e6:.1f} MB" + (f"; {'; '.join(faults)}" if faults else "")
    )


def describe_power(rows: int, source: float, target: Target) -> str:
    """Says which loss the dev split can rule out; empty if it can rule out the accepted one.

    Args:
        rows: Rows of the dev split.
        source: The source's score on them.
        target: The limits.
    """
    accepted = target.max_drop.of(source)
    needed = rows_needed(EXPECTED_DISCORDANCE, accepted)
    if rows >= needed:
        return ""
    least = smallest_margin(rows, EXPECTED_DISCORDANCE)
    return (
        f"{rows:,} rows of dev can rule out a loss above {least:.3g}, not {accepted:.3g}; about {needed:,} rows could"
    )
