"""Two models' scores on the same draws of the judged units: the paired bootstrap, for any metric."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hfcompress.report.statistics.proportions import Pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

LEAST_DRAWS = 100


@dataclass(frozen=True)
class Draws:
    """The scores of two models, and the same scores of units that were drawn anew with replacement.

    A draw holds the same units for both models, so what makes a unit hard for both cancels out of their difference
    (paired bootstrap: Efron and Tibshirani 1993, chapter 13; Davison and Hinkley 1997). The units are what the metric
    judges: a row, a question, a sentence, a document.

    If both models score alike in every draw, the bootstrap would be certain that they always do. Then the score test of
    as many rows, of which none flips, takes its place (`proportions.Pairs`).

    Attributes:
        source, result: The metric of all units.
        source_draws, result_draws: `(samples,)`, the metric of each draw.
        units: Number of units, or of clusters where these were drawn.
        lower_is_better: True for an error, such as `mse`.
    """

    source: float
    result: float
    source_draws: Array = field(repr=False)
    result_draws: Array = field(repr=False)
    units: int
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if self.source_draws.shape != self.result_draws.shape or len(self.source_draws) < LEAST_DRAWS:
            raise ValueError(
                f"a paired bootstrap has the same {LEAST_DRAWS} or more draws of both models, not "
                f"{len(self.source_draws)} and {len(self.result_draws)}"
            )

    def test_name(self, relative: bool) -> str:
        """Names the test behind `interval` and `p_above`."""
        if self._none_flips is not None:
            return f"{self._none_flips.test_name(relative)}: no draw differs"
        return f"paired bootstrap, {len(self.source_draws):,} draws"

    def change(self, relative: bool = False) -> float:
        """The result's score less the source's, or that as a share of the source's."""
        if relative and not self.source:
            raise ValueError("the source scores 0, so no drop relative to it is defined; use an absolute one")
        return (self.result - self.source) / (abs(self.source) if relative else 1)

    @property
    def error(self) -> float:
        """The standard error of the change: the standard deviation of its draws."""
        return float(self._changes(relative=False).std(ddof=1))

    def interval(self, level: float = 0.95, relative: bool = False) -> tuple[float, float]:
        """The percentile interval of the change: its ends are the k-th lowest and the k-th highest draw.

        `k = ⌊(1 - level) / 2 (samples + 1)⌋`, at least 1 (Davison and Hinkley 1997, section 5.3.1), so that it agrees
        with `p_above` and `p_below`.
        """
        if self._none_flips is not None:
            return self._none_flips.interval(level, relative)
        drawn = np.sort(self._changes(relative))
        k = max(1, math.floor((1 - level) / 2 * (len(drawn) + 1) + 1e-9))
        return float(drawn[k - 1]), float(drawn[-k])

    def p_above(self, change: float, relative: bool = False) -> float:
        """The one-sided p-value of "the true change is at most `change`"; small if it is shown to be above.

        `(1 + draws at or below) / (1 + draws)` (Davison and Hinkley 1997, equation 4.11), never 0.
        """
        if self._none_flips is not None:
            return self._none_flips.p_above(change, relative)
        return self._share(self._changes(relative) <= change)

    def p_below(self, change: float, relative: bool = False) -> float:
        """The one-sided p-value of "the true change is at least `change`"; small if it is shown to be below."""
        if self._none_flips is not None:
            return self._none_flips.p_below(change, relative)
        return self._share(self._changes(relative) >= change)

    @property
    def _none_flips(self) -> Pairs | None:
        return Pairs(self.units, 0, 0, 0) if np.array_equal(self.source_draws, self.result_draws) else None

    def _changes(self, relative: bool) -> Array:
        self.change(relative)  # refuses a source of 0
        difference = self.result_draws - self.source_draws
        # Where a draw of the source scores 0, its sign says by which end of the interval it lies.
        return difference / np.maximum(np.abs(self.source_draws), np.finfo(float).tiny) if relative else difference

    def _share(self, among: Array) -> float:
        return float((1 + among.sum()) / (1 + len(among)))
