"""What compression changed in the answers: flipped rows with examples, agreement, and the distance of probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from hfcompress.report.statistics.proportions import Pairs, count_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

WORST = 10


@dataclass(frozen=True)
class Flips:
    """The rows that only one of two models answers right.

    Attributes:
        pairs: How many rows each model answers right.
        broken: Numbers of the rows that only the source answers right, the worst first.
        repaired: Numbers of the rows that only the result answers right, the greatest gain first.
    """

    pairs: Pairs
    broken: list[int]
    repaired: list[int]


def find_flips(source_right: Array, result_right: Array, fall: Array | None = None, worst: int = WORST) -> Flips:
    """Finds the rows that flipped from right to wrong and from wrong to right.

    Args:
        source_right, result_right: `(rows,)`, true where the model is right.
        fall: `(rows,)`, by how much the result does worse: the source's `logit_margins` less the result's. Rows are
            given in their own order without it.
        worst: How many rows of each kind are given.
    """
    pairs = count_pairs(source_right, result_right)
    ours, theirs = np.asarray(source_right, dtype=bool), np.asarray(result_right, dtype=bool)
    depth = np.zeros(len(ours)) if fall is None else np.asarray(fall, dtype=float)
    if depth.shape != ours.shape:
        raise ValueError(f"there are {len(ours)} rows and {len(depth)} margins")
    return Flips(pairs, _first(ours & ~theirs, -depth, worst), _first(theirs & ~ours, depth, worst))


def _first(among: Array, key: Array, most: int) -> list[int]:
    """The rows among some with the lowest keys, the lowest first."""
    rows = np.flatnonzero(among)
    return [int(row) for row in rows[np.argsort(key[rows], kind="stable")][:most]]


def logit_margins(logits: Array, references: Array) -> Array:
    """Computes by how much the right class's logit exceeds the largest other one; below 0 where the answer is wrong.

    Args:
        logits: `(rows, classes)`.
        references: `(rows,)` class ids.

    Returns:
        `(rows,)`.
    """
    scores, rows = require_logits(logits, references), np.arange(len(logits))
    others = scores.copy()
    others[rows, references] = -np.inf
    return scores[rows, references] - others.max(axis=1)


def share_agreement(source: Array, result: Array) -> float:
    """Computes the share of rows with the same answer from both models, right or wrong."""
    ours, theirs = np.asarray(source), np.asarray(result)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(
            f"both models answer the same rows: {len(ours)} answers of the source, {len(theirs)} of the result"
        )
    return float(np.mean(ours == theirs))


def mean_divergence(source_logits: Array, result_logits: Array) -> float:
    """Computes `KL(source ‖ result) = Σ p (log p - log q)` in nats, the mean over rows (Kullback and Leibler 1951).

    Args:
        source_logits, result_logits: `(rows, classes)`, with the classes in the same order.
    """
    if np.shape(source_logits) != np.shape(result_logits):
        raise ValueError(f"logits of both models are alike: {np.shape(source_logits)} and {np.shape(result_logits)}")
    ours, theirs = (log_softmax(np.asarray(logits, dtype=float), axis=-1) for logits in (source_logits, result_logits))
    return float((np.exp(ours) * (ours - theirs)).sum(axis=-1).mean())


def require_logits(logits: Array, references: Array) -> Array:
    """Returns logits `(rows, classes)` as 64-bit numbers.

    Raises:
        ValueError: if they do not fit the references, or are not finite.
    """
    scores = np.asarray(logits, dtype=float)
    if scores.ndim != 2 or len(scores) != len(references) or scores.shape[1] < 2 or not len(scores):
        raise ValueError(f"logits are (rows, classes), not {scores.shape} for {len(references)} references")
    if not np.isfinite(scores).all():
        raise ValueError("logits are finite numbers")
    if np.min(references) < 0 or np.max(references) >= scores.shape[1]:
        raise ValueError(f"references are class ids from 0 to {scores.shape[1] - 1}")
    return scores
