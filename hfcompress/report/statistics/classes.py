"""What compression changed in each class, tag or kind of entity."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfcompress.data.entities import find_entities
from hfcompress.data.metrics import f1_of_counts
from hfcompress.report.statistics.proportions import mcnemar_exact
from hfcompress.report.statistics.several import LEVEL

RARE = 30
"""Fewer items of a class than this: one more mistake moves its recall by more than three points."""
Items = dict[str, set[Hashable]]
"""Where the items of each class stand."""


@dataclass(frozen=True)
class ClassChange:
    """The scores of one class in the source and in the result.

    Attributes:
        name: The class.
        items: How many items of the references are of this class.
        source_f1, result_f1: F1 of the class.
        broken: Items of this class that only the source finds.
        repaired: Items of this class that only the result finds.
        p_value: McNemar's exact test of these two, not yet adjusted for the number of classes.
        rare: True if there are fewer than 30 items, so that a change of F1 says little.
    """

    name: str
    items: int
    source_f1: float
    result_f1: float
    broken: int
    repaired: int
    p_value: float
    rare: bool

    @property
    def change(self) -> float:
        """The result's F1 less the source's."""
        return self.result_f1 - self.source_f1


def compare_classes(
    source: Sequence[Any], result: Sequence[Any], references: Sequence[Any], names: Sequence[str] | None = None
) -> list[ClassChange]:
    """Compares two models class by class, the largest loss first; the unit is a row with one class.

    Args:
        source, result: Their predicted classes, one a row.
        references: The right classes, one a row.
        names: What class ids are called.
    """
    if not len(source) == len(result) == len(references):
        raise ValueError(
            f"both models answer the same rows: {len(source)}, {len(result)} and {len(references)} entries are given"
        )
    return _compare(*(_items(each, names) for each in (source, result, references)))


def compare_tags(source: Sequence[Any], result: Sequence[Any], references: Sequence[Any]) -> list[ClassChange]:
    """Compares two models tag by tag; the unit is a word, and arguments are lists of tags, one a sentence."""
    return _compare(*map(_words, (source, result, references)))


def compare_entities(source: Sequence[Any], result: Sequence[Any], references: Sequence[Any]) -> list[ClassChange]:
    """Compares two models by kind of entity, as conlleval reads them; arguments are lists of tags, one a sentence."""
    return _compare(*map(_entities, (source, result, references)))


def read_class(broken: int, repaired: int, p_adjusted: float) -> Literal["better", "worse", "within noise"]:
    """Tells whether a result finds more or fewer items of a class than its source, beyond noise.

    Args:
        broken, repaired: Items of the class that only the source finds, and that only the result finds.
        p_adjusted: The p-value of these two, adjusted for all classes that are tested.
    """
    if p_adjusted > LEVEL:
        return "within noise"
    return "worse" if broken > repaired else "better"


def _items(classes: Sequence[Any], names: Sequence[str] | None) -> Items:
    return _group((str(value) if names is None else names[value], row) for row, value in enumerate(classes))


def _words(sentences: Sequence[Any]) -> Items:
    return _group((tag, (row, word)) for row, tags in enumerate(sentences) for word, tag in enumerate(tags))


def _entities(sentences: Sequence[Any]) -> Items:
    return _group((kind, (row, *span)) for row, tags in enumerate(sentences) for kind, *span in find_entities(tags))


def _group(items: Iterable[tuple[str, Hashable]]) -> Items:
    groups: Items = defaultdict(set)
    for name, place in items:
        groups[name].add(place)
    return groups


def _compare(source: Items, result: Items, references: Items) -> list[ClassChange]:
    """Compares what two models found with what is there; a class that is only predicted is a class too."""
    names = sorted({*source, *result, *references})
    changes = [_change(name, *(items.get(name, set()) for items in (source, result, references))) for name in names]
    return sorted(changes, key=lambda each: each.change)


def _change(name: str, source: set[Hashable], result: set[Hashable], references: set[Hashable]) -> ClassChange:
    found, still = references & source, references & result
    broken, repaired = len(found - still), len(still - found)
    return ClassChange(
        name=name,
        items=len(references),
        source_f1=f1_of_counts(len(found), len(source), len(references)),
        result_f1=f1_of_counts(len(still), len(result), len(references)),
        broken=broken,
        repaired=repaired,
        p_value=mcnemar_exact(broken, repaired),
        rare=len(references) < RARE,
    )
