"""Finds entities in a sequence of tags as conlleval does, and counts them for the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

OUTSIDE = "O"
MISSED = ""
"""The predicted tag of a word that the model did not see: it is never right, and outside of every entity."""
Entity = tuple[str, int, int]


def find_entities(tags: Sequence[str]) -> set[Entity]:
    """Finds the entities of a sentence: type, first word, last word.

    One rule reads IOB2 (`B-PER I-PER`), IOB1 (`B-` only separates neighbours of one type), IOBES and IOE: an entity
    begins at `B-` or `S-`, where the type changes, and after `O`, `E-` or `S-`. A tag without a prefix is a type;
    neighbours of one type are one entity.

    Source: Tjong Kim Sang and Buchholz 2000, conlleval.
    """
    found: set[Entity] = set()
    kind, start, closed = None, 0, True
    for index, tag in enumerate([*tags, OUTSIDE]):
        prefix, name = _split_tag(tag)
        goes_on = name is not None and name == kind and not closed and prefix not in ("B", "S")
        if kind is not None and not goes_on:
            found.add((kind, start, index - 1))
        if not goes_on:
            kind, start = name, index
        closed = prefix in ("E", "S")
    return found


def _split_tag(tag: str) -> tuple[str, str | None]:
    """Splits a tag into prefix and type; outside of entities, the type is None."""
    if tag in (OUTSIDE, MISSED):
        return OUTSIDE, None
    prefix, _, name = tag.partition("-")
    return (prefix, name) if prefix in ("B", "I", "E", "S") else ("I", tag)


def count_entities(predictions: Array, references: Array) -> Array:
    """Counts, in each sentence, the entities that are right, predicted and expected, the right tags, and the words.

    Args:
        predictions, references: `(sentences,)` lists of tags.

    Returns:
        `(sentences, 5)`.
    """
    import numpy as np

    rows = []
    for predicted, expected in zip(predictions, references, strict=True):
        ours, theirs = find_entities(predicted), find_entities(expected)
        right = sum(p == e for p, e in zip(predicted, expected, strict=True))
        rows.append((len(ours & theirs), len(ours), len(theirs), right, len(expected)))
    return np.array(rows, dtype=float)
