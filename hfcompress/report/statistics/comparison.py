"""The change from the source to a result: its interval, and the verdict at a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.data.metrics import Metric, RowMetric, resample
from hfcompress.report.statistics.draws import Draws
from hfcompress.report.statistics.proportions import Pairs, count_pairs
from hfcompress.utils.margin import Margin

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Evidence = Pairs | Draws
ALPHA = 0.05


def compare_answers(
    metric: Metric,
    source: Array,
    result: Array,
    references: Array,
    *,
    lower_is_better: bool = False,
    clusters: Sequence[Any] | Array | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Evidence:
    """Scores two models on the same units, in the way that suits the metric.

    Args:
        metric: Such as `task.metrics["f1"]`. One that is `right_or_wrong` is counted; any other one is drawn anew.
        source, result: Their predictions, one a unit.
        references: What is right, one a unit.
        lower_is_better: True for an error.
        clusters: What each unit belongs to, such as a question's document; clusters are then drawn anew, whole, also
            for right and wrong answers, whose tests take rows to be independent.
        samples: Draws of the bootstrap.
        seed: Decides the draws.
    """
    if not len(source) == len(result) == len(references) or not len(references):
        raise ValueError(
            f"both models answer the same units: {len(source)} answers of the source, {len(result)} of the result and "
            f"{len(references)} references"
        )
    if clusters is not None and len(clusters) != len(references):
        raise ValueError(f"each unit is in a cluster: {len(references)} units, {len(clusters)} clusters")
    if isinstance(metric, RowMetric) and metric.right_or_wrong and clusters is None:
        ours, theirs = (metric.rows(answers, references)[:, 0] for answers in (source, result))
        return count_pairs(ours, theirs)
    ours, theirs = (resample(metric, answers, references, samples, seed, clusters) for answers in (source, result))
    scores = metric(source, references), metric(result, references)
    units = len(references) if clusters is None else len(set(clusters))
    return Draws(*scores, ours, theirs, units, lower_is_better)


@dataclass(frozen=True)
class Difference:
    """By how much a result differs from its source on the same units.

    Attributes:
        change: The result's score less the source's.
        low, high: The 95% interval.
        reading: `better` or `worse` if the interval lies on one side of 0, else `within noise`.
        units: Number of units.
        test: Where the interval comes from.
    """

    change: float
    low: float
    high: float
    reading: Literal["better", "worse", "within noise"]
    units: int
    test: str


def paired_difference(evidence: Evidence) -> Difference:
    """Computes the 95% interval of the change: of score tests for right and wrong answers, else of the bootstrap.

    A percentile interval of right and wrong answers would be a point if no row flips, and too narrow if few do
    (Fagerland et al. 2014, Statistics in Medicine 33:2850-2875, who recommend Tango's).
    """
    low, high = evidence.interval()
    side = "above" if low > 0 else "below" if high < 0 else ""
    good, bad = ("below", "above") if evidence.lower_is_better else ("above", "below")
    reading: Literal["better", "worse", "within noise"]
    reading = "better" if side == good else "worse" if side == bad else "within noise"
    return Difference(evidence.change(), low, high, reading, evidence.units, evidence.test_name(relative=False))


@dataclass(frozen=True)
class NonInferiority:
    """The verdict on a drop beyond a margin, at a one-sided level of 5%.

    Attributes:
        verdict: `shown` if the drop is smaller than the margin, `worse` if it is larger, `not shown` if the units
            cannot tell.
        margin: The largest drop that is accepted.
        drop: The drop that was seen, negative for a gain; like `largest` in the margin's unit, so a share of the
            source's score for a relative margin.
        least, largest: The least and the largest drop that the units leave possible: the 90% interval, so that each of
            them is a one-sided 95% bound.
        p_value: The one-sided p-value of "the drop is the margin, or more".
        test: Where these come from.
    """

    verdict: Literal["shown", "not shown", "worse"]
    margin: Margin
    drop: float
    least: float
    largest: float
    p_value: float
    test: str

    @property
    def sentence(self) -> str:
        """The verdict in words: `the drop is below 1%: it is at most 0.762% (p = 0.012)`."""
        if self.verdict == "worse":
            return f"the drop is above {self.margin}: it is at least {self._written(self.least)}"
        bound = f"it is at most {self._written(self.largest)} (p = {self.p_value:.2g})"
        if self.verdict == "shown":
            return f"the drop is below {self.margin}: {bound}"
        return f"the drop is not shown to be below {self.margin}: {bound}"

    def _written(self, drop: float) -> str:
        return f"{100 * drop:.3g}%" if self.margin.relative else f"{drop:.3g}"


def non_inferiority(evidence: Evidence, margin: Margin) -> NonInferiority:
    """Tests "the result scores worse than the source by the margin, or more", one-sided at 5%.

    `shown` if that is rejected, which is so if the 90% interval of the change lies on the good side of the margin
    (Schuirmann 1987); `worse` if the opposite is rejected. For right and wrong answers it is the score test of Tango
    1998 and Nam 1997 (absolute margin) or of Nam and Blackwelder 2002 (relative margin), else the bootstrap.
    """
    relative, bad = margin.relative, margin.value
    low, high = evidence.interval(1 - 2 * ALPHA, relative)
    change = evidence.change(relative)
    if evidence.lower_is_better:
        p_value, p_worse = evidence.p_below(bad, relative), evidence.p_above(bad, relative)
        drop, least, largest = change, low, high
    else:
        p_value, p_worse = evidence.p_above(-bad, relative), evidence.p_below(-bad, relative)
        drop, least, largest = -change, -high, -low
    verdict: Literal["shown", "not shown", "worse"]
    verdict = "shown" if p_value <= ALPHA else "worse" if p_worse <= ALPHA else "not shown"
    return NonInferiority(verdict, margin, drop, least, largest, p_value, evidence.test_name(relative))
