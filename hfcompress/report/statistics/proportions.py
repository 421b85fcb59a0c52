"""Two models that are right or wrong on the same rows: McNemar's exact test, and score tests of the change.

In the formulas, of `n` rows a share `b` is broken (only the source is right) and a share `r` is repaired (only the
result is right); `p` and `q` are the shares that the result and the source answer right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtr, ndtr, ndtri

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_EDGE = 1e-12
"""How near a root is sought to values at which a statistic is infinite."""
_NEAR_0 = 1e-6
"""The least ratio of two scores that is tried; nearer to 0 its statistic drowns in rounding."""


@dataclass(frozen=True)
class Pairs:
    """Counts of the rows that each of two models answers right.

    Attributes:
        both: Rows that both answer right.
        broken: Rows that only the source answers right.
        repaired: Rows that only the result answers right.
        neither: Rows that both answer wrong.
    """

    both: int
    broken: int
    repaired: int
    neither: int

    lower_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.both, self.broken, self.repaired, self.neither) < 0 or not self.units:
            raise ValueError(f"pairs are counts of at least one row, not {self}")

    @property
    def units(self) -> int:
        """Number of rows."""
        return self.both + self.broken + self.repaired + self.neither

    @property
    def source(self) -> float:
        """The share that the source answers right."""
        return (self.both + self.broken) / self.units

    @property
    def result(self) -> float:
        """The share that the result answers right."""
        return (self.both + self.repaired) / self.units

    @property
    def discordance(self) -> float:
        """The share of rows that only one of them answers right."""
        return (self.broken + self.repaired) / self.units

    def test_name(self, relative: bool) -> str:
        """Names the test behind `interval` and `p_above`."""
        return "score test, Nam and Blackwelder 2002" if relative else "score test, Tango 1998"

    def interval(self, level: float = 0.95, relative: bool = False) -> tuple[float, float]:
        """The changes that the score test does not reject, of the score or relative to the source's score.

        It solves `Z(change) = ±z` (Tango 1998; Tang et al. 2003 for the ratio), so it has a width even if no row flips.
        """
        z = float(ndtri((1 + level) / 2))
        statistic, change = self._statistic(relative), self.change(relative)
        least, most = (_NEAR_0 - 1, (2 + change) * 100 * self.units) if relative else (-1.0, 1.0)
        low = _solve(lambda at: statistic(at) - z, least, change)
        return low, _solve(lambda at: statistic(at) + z, change, most)

    def change(self, relative: bool = False) -> float:
        """The result's score less the source's, or that as a share of the source's."""
        return (self.result - self.source) / (self._positive_source() if relative else 1)

    def p_above(self, change: float, relative: bool = False) -> float:
        """The one-sided p-value of "the true change is at most `change`"; small if it is shown to be above."""
        return float(ndtr(-self._statistic(relative)(change)))

    def p_below(self, change: float, relative: bool = False) -> float:
        """The one-sided p-value of "the true change is at least `change`"; small if it is shown to be below."""
        return float(ndtr(self._statistic(relative)(change)))

    def _statistic(self, relative: bool) -> Callable[[float], float]:
        if relative:
            self._positive_source()
            return lambda change: score_of_ratio(self, 1 + change)
        return lambda change: score_of_difference(self, change)

    def _positive_source(self) -> float:
        if not self.source:
            raise ValueError(
                "the source answers no row right, so no drop relative to it is defined; use an absolute one"
            )
        return self.source


def count_pairs(source_right: Array, result_right: Array) -> Pairs:
    """Counts how often each of two models is right.

    Args:
        source_right, result_right: `(rows,)`, true where the model is right.
    """
    ours, theirs = np.asarray(source_right, dtype=bool), np.asarray(result_right, dtype=bool)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(
            f"both models answer the same rows: shapes {ours.shape} and {theirs.shape} differ or are no list"
        )
    cells = ((ours & theirs), (ours & ~theirs), (~ours & theirs), (~ours & ~theirs))
    return Pairs(*(int(cell.sum()) for cell in cells))


def mcnemar_exact(broken: int, repaired: int) -> float:
    """The two-sided p-value of "as many rows are broken as repaired": McNemar's exact conditional test.

    Each flipped row is a fair coin: `p = 2 P(X <= min(broken, repaired))`, `X ~ Binomial(broken + repaired, 1/2)`, at
    most 1 (McNemar 1947; Agresti 2013, Categorical Data Analysis, chapter 11). The mid-p value is smaller, and its
    error was below the nominal one in all cases that Fagerland et al. 2013 tried. The exact value is taken because its
    error is below in every case, by proof; the price is power where few rows flip.
    """
    if broken < 0 or repaired < 0:
        raise ValueError(f"flipped rows are counts of 0 or more, not {broken} and {repaired}")
    return min(1.0, 2 * float(bdtr(min(broken, repaired), broken + repaired, 0.5)))


def score_of_difference(pairs: Pairs, difference: float) -> float:
    """The score statistic of "the true `p - q` is `difference`", standard normal if it is true.

    `Z = √n (r - b - difference) / √null_variance`: Tango 1998, Statistics in Medicine 17:891-908; Nam 1997, Biometrics
    53:1422-1430, derives the same test. At difference 0 it is McNemar's test without continuity correction.
    """
    b, r = pairs.broken / pairs.units, pairs.repaired / pairs.units
    return _standardize(r - b - difference, null_variance(b, r, difference), pairs.units)


def null_variance(broken: float, repaired: float, difference: float) -> float:
    """The variance of a row's `result - source` if the true difference is given: `2 b̃ + difference (1 - difference)`.

    `b̃` is the most likely share of broken rows under that condition, the larger root of `A b̃² + B b̃ + C` with `A = 2`,
    `B = -(b + r) + (2 - r + b) difference`, `C = -b difference (1 - difference)` (Tango 1998).

    Args:
        broken, repaired: The shares `b` and `r` that are seen.
        difference: The true difference that is supposed, between -1 and 1.
    """
    linear = -(broken + repaired) + (2 - repaired + broken) * difference
    constant = -broken * difference * (1 - difference)
    root = (math.sqrt(max(linear**2 - 8 * constant, 0.0)) - linear) / 4
    return 2 * root + difference * (1 - difference)


def score_of_ratio(pairs: Pairs, ratio: float) -> float:
    """The score statistic of "the true `p / q` is `ratio`", standard normal if it is true.

    `Z = √n (p - ratio q) / √(ratio (r̃ + b̃))` with the most likely `r̃` and `b̃` under that condition (Nam and Blackwelder
    2002, Statistics in Medicine 21:689-699; Tang et al. 2003, Statistics in Medicine 22:1217-1233):
    `r̃ = (-p + ratio² (q + 2 r) + √((p - ratio² q)² + 4 ratio² r b)) / (2 ratio (ratio + 1))` and
    `b̃ = ratio r̃ - (ratio - 1) (1 - neither)`.
    """
    n, p, q = pairs.units, pairs.result, pairs.source
    b, r, square = pairs.broken / n, pairs.repaired / n, ratio**2
    root = math.sqrt((p - square * q) ** 2 + 4 * square * r * b)
    repaired = (-p + square * (q + 2 * r) + root) / (2 * ratio * (ratio + 1))
    broken = ratio * repaired - (ratio - 1) * (1 - pairs.neither / n)
    return _standardize(p - ratio * q, ratio * (repaired + broken), n)


def _standardize(distance: float, variance: float, rows: int) -> float:
    """`distance` in standard errors; infinite if nothing varies and yet they differ."""
    if variance > _EDGE**2:
        return distance * math.sqrt(rows / variance)
    return 0.0 if abs(distance) < _EDGE else math.copysign(math.inf, distance)


def _solve(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of a decreasing function; the end beyond which it would lie, if there is none between."""
    inner = low + _EDGE, high - _EDGE
    if inner[0] >= inner[1]:
        return min(low, high)
    if function(inner[0]) <= 0:
        return low
    if function(inner[1]) >= 0:
        return high
    return float(brentq(function, *inner, xtol=1e-10))
