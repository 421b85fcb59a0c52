"""Judges a candidate on the dev split by a sequential paired race: it ends as soon as the rows give a clear answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.report.statistics.comparison import ALPHA, Evidence, compare_answers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hfcompress.data.metrics import Metric
    from hfcompress.measure.answers import Answer
    from hfcompress.utils.margin import Margin

    Array = NDArray[Any]

FIRST = 500
"""Rows of the first look; each later look has twice the rows of the one before."""


@dataclass(frozen=True)
class Verdict:
    """The end of a race, in the unit of the margin.

    Attributes:
        holds: True if a loss above the margin is ruled out.
        drop: The loss that was seen.
        least, largest: The least and the largest loss that the rows leave possible.
        rows: Rows that were asked.
    """

    holds: bool
    drop: float
    least: float
    largest: float
    rows: int


def list_looks(rows: int) -> list[int]:
    """Lists the numbers of rows after which a race is judged: 500, 1,000, 2,000, …, and all rows."""
    looks = []
    count = FIRST
    while count < rows:
        looks.append(count)
        count *= 2
    return [*looks, rows]


def race(
    source: Answer,
    ask: Callable[[Sequence[int]], Answer],
    metric: Metric,
    margin: Margin,
    *,
    lower_is_better: bool = False,
    seed: int = 0,
    samples: int = 1000,
) -> Verdict:
    """Asks a candidate more and more rows, until its loss is clearly below or above the margin.

    The error of 5% is shared by all looks (Bonferroni), so that looking several times does not make it larger.

    Args:
        source: The source's answers to all rows.
        ask: Gives the candidate's answers to rows, by their numbers, in that order.
        metric: The metric.
        margin: The largest loss that is accepted.
        lower_is_better: True for an error.
        seed: Decides the order of the rows, and the draws of the bootstrap.
        samples: Draws of the bootstrap.
    """
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(source.references))
    looks = list_looks(len(order))
    parts: list[Array] = []
    for start, end in zip([0, *looks], looks, strict=False):
        parts.append(ask(order[start:end].tolist()).predictions)
        asked = order[:end]
        evidence = compare_answers(
            metric, source.predictions[asked], np.concatenate(parts), source.references[asked],
            lower_is_better=lower_is_better, samples=samples, seed=seed,
        )  # fmt: skip
        verdict = judge(evidence, margin, ALPHA / len(looks))
        if verdict.holds or verdict.least > margin.value:
            break
    return verdict


def judge(evidence: Evidence, margin: Margin, alpha: float = ALPHA) -> Verdict:
    """Bounds the loss at a one-sided level.

    A source that scores 0 has no loss relative to it; the search refuses it before.
    """
    low, high = evidence.interval(1 - 2 * alpha, margin.relative)
    change = evidence.change(margin.relative)
    if evidence.lower_is_better:
        drop, least, largest = change, low, high
    else:
        drop, least, largest = -change, -high, -low
    return Verdict(largest <= margin.value, drop, least, largest, evidence.units)
