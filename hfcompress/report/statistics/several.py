"""Several models, and several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""An adjusted p-value of at most this is beyond noise."""


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
    """The scores of one recipe with several seeds.

    Attributes:
        mean: Their mean.
        deviation: Their standard deviation, with `count - 1` in the denominator; None for one seed.
        count: How many there are.
    """

    mean: float
    deviation: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f} ({self.count} seeds)")


def summarize_seeds(values: Sequence[float]) -> Seeds:
    """Computes the mean and the standard deviation of the scores of several seeds."""
    if not len(values):
        raise ValueError("there is no score to summarize")
    return Seeds(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))
