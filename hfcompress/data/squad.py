"""Answers as SQuAD compares them (Rajpurkar et al. 2016, arXiv:1606.05250; unanswerable: 2018, arXiv:1806.03822)."""

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
    """Lower case, without punctuation and articles, single spaces."""
    plain = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def word_f1(predicted: str, expected: str) -> float:
    """F1 of the words of two normalised answers; where one is empty, whether both are."""
    ours, theirs = predicted.split(), expected.split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * sum((Counter(ours) & Counter(theirs)).values()) / (len(ours) + len(theirs))


def score_overlap(predictions: Array, references: Array) -> Array:
    """Of each question: the F1 of the nearest given answer, and 1.

    Args:
        predictions: `(questions,)` texts, empty for "no answer".
        references: `(questions,)` lists of given answers; one that is empty says that there is none.
    """
    return _score_best(predictions, references, word_f1)


def score_match(predictions: Array, references: Array) -> Array:
    """Of each question: whether the answer is one of those given, and 1; the arguments are those of `overlaps`."""
    return _score_best(predictions, references, lambda predicted, expected: float(predicted == expected))


def _score_best(predictions: Array, references: Array, compare: Callable[[str, str], float]) -> Array:
    import numpy as np

    pairs = zip(map(normalize_answer, predictions), references, strict=True)
    return np.array([(max(compare(ours, normalize_answer(text)) for text in given), 1.0) for ours, given in pairs])
