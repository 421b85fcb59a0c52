"""How well a model's probabilities tell how often it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from hfcompress.report.statistics.flips import require_logits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

BINS = 15


@dataclass(frozen=True)
class Confidence:
    """Measures of a classifier's probabilities; less is better for each.

    Attributes:
        ece: Expected calibration error: by how much the probability of the answer differs from how often it is right.
        nll: Negative log-likelihood of the right class, in nats.
        brier: Brier's score, 0 to 2.
        bins: The bins of the ECE, of equal width between 0 and 1.
    """

    ece: float
    nll: float
    brier: float
    bins: int


def measure_confidence(logits: Array, references: Array, bins: int = BINS) -> Confidence:
    """Computes ECE, NLL and Brier's score of a classifier.

    - ECE: `Σ |B| / n · |accuracy(B) - confidence(B)|` over bins of equal width of the answer's probability, open below
      and closed above (Guo et al. 2017, arXiv:1706.04599, equation 3; 15 bins as there).
    - NLL: the mean of `-log p(right class)`.
    - Brier: the mean of `Σ (p - y)²` over all classes (Brier 1950). For two classes it is twice the usual one.

    Args:
        logits: `(rows, classes)`.
        references: `(rows,)` class ids.
        bins: How many bins.
    """
    if bins < 1:
        raise ValueError(f"there is at least one bin, not {bins}")
    log_p = log_softmax(require_logits(logits, references), axis=1)
    p, rows, right = np.exp(log_p), np.arange(len(log_p)), np.asarray(references)
    wanted = np.zeros_like(p)
    wanted[rows, right] = 1
    return Confidence(
        ece=expected_calibration_error(p.max(axis=1), p.argmax(axis=1) == right, bins),
        nll=float(-log_p[rows, right].mean()),
        brier=float(((p - wanted) ** 2).sum(axis=1).mean()),
        bins=bins,
    )


def expected_calibration_error(confidences: Array, right: Array, bins: int = BINS) -> float:
    """Computes the ECE of answers (see `measure_confidence`).

    Args:
        confidences: `(rows,)` probabilities of the answers.
        right: `(rows,)`, true where the answer is right.
        bins: How many bins.
    """
    found = np.clip(np.ceil(np.asarray(confidences) * bins).astype(int) - 1, 0, bins - 1)
    # |B| · |accuracy - confidence| is the absolute value of a sum over the bin
    gaps = np.bincount(found, weights=np.asarray(right, dtype=float) - confidences, minlength=bins)
    return float(np.abs(gaps).sum() / len(found))
