"""Compares answers as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250; unanswerable: 2018, arXiv:1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Converts to lower case with single spaces, without punctuation and articles."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(predicted: str, expected: str) -> float:
    """Computes F1 of the words of two normalized answers; if one is empty, 1 if both are, else 0."""
    ours, theirs = predicted.split(), expected.split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def score_overlap(predictions: Array, references: Array) -> Array:
    """Returns, for each question, the F1 of the nearest given answer, and 1; `(questions, 2)`.

    Args:
        predictions: `(questions,)` texts, empty for "no answer".
        references: `(questions,)` lists of given answers; an empty text means that there is no answer.
    """
    return _score_best(predictions, references, word_f1)


def score_match(predictions: Array, references: Array) -> Array:
    """Returns, for each question, 1 if its answer is a given one, else 0, and 1; arguments as in `score_overlap`."""
    return _score_best(predictions, references, lambda predicted, expected: float(predicted == expected))


def _score_best(predictions: Array, references: Array, compare: Callable[[str, str], float]) -> Array:
    import numpy as np

    pairs = zip(map(normalize_answer, predictions), references, strict=True)
    return np.array([(max(compare(ours, normalize_answer(text)) for text in given), 1.0) for ours, given in pairs])
