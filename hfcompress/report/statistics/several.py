"""Several models, and several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.05
"""An adjusted p-value of at most this is beyond noise."""
_EQUAL = 1e-12
"""Changes that differ by less are equal but for rounding."""


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several tests, so that all of them together are wrong at most as often as one alone.

    With m values in ascending order, the i-th becomes the largest of `(m - j + 1) p_j` for `j <= i`, at most 1 (Holm
    1979, Scandinavian Journal of Statistics 6:65-70). The tests may depend on one another, as those of several models
    on the same rows do.

    Returns:
        The adjusted values, in the order of `p_values`.
    """
    values = np.asarray(p_values, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1: {list(p_values)}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class Seeds:
    """The scores of one model that was made with several seeds.

    Attributes:
        values: The scores, one a seed.
        mean: Their mean.
        sd: Their standard deviation, with `n - 1` in the denominator; None for one seed.
    """

    values: list[float]
    mean: float
    sd: float | None


def summarize_seeds(values: Sequence[float]) -> Seeds:
    """Computes the mean and the standard deviation of the scores of several seeds."""
    if not len(values):
        raise ValueError("there is no score to summarize")
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Seeds([float(value) for value in values], float(np.mean(values)), sd)


@dataclass(frozen=True)
class SeedChange:
    """By how much a result differs from its source over several seeds, on the same rows.

    Attributes:
        mean: The mean of the result's score less the source's.
        low, high: Its 95% interval over seeds; None if each seed gives the same change.
        p_value: Of "another seed changes nothing on average"; None if each seed gives the same change.
        reading: `better` or `worse` if the interval lies on one side of 0.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    reading: Literal["better", "worse", "within noise", "no spread"]


def compare_seeds(source: Sequence[float], result: Sequence[float], lower_is_better: bool = False) -> SeedChange:
    """Compares the scores of source and result seed by seed: Student's paired t-test, and its interval.

    The unit is a seed. So the interval says what other seeds would give on these rows, and not what other rows would.
    It takes the changes to be normally distributed (Student 1908, Biometrika 6:1-25; Gosset's pairs).

    Args:
        source, result: Their scores, one a seed; the same score of the source each time if it was not trained.
        lower_is_better: True for an error.
    """
    from scipy.stats import ttest_rel

    if len(source) != len(result) or len(result) < 2:
        raise ValueError(f"a paired test needs two seeds or more: {len(source)} and {len(result)} scores are given")
    changes = np.subtract(result, source)
    mean = float(changes.mean())
    if np.ptp(changes) < _EQUAL:
        return SeedChange(mean, None, None, None, "no spread")
    test = ttest_rel(result, source)
    low, high = test.confidence_interval(1 - LEVEL)
    side = "above" if low > 0 else "below" if high < 0 else ""
    reading: Literal["better", "worse", "within noise"] = "within noise"
    if side:
        reading = "better" if (side == "below") == lower_is_better else "worse"
    return SeedChange(mean, float(low), float(high), float(test.pvalue), reading)
