"""The change in parts of the rows: by length, or by a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hfcompress.data.metrics import Metric
from hfcompress.report.statistics.comparison import Difference, compare_answers, paired_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MOST = 20


@dataclass(frozen=True)
class Slice:
    """The scores of one part of the rows.

    Attributes:
        name: A range of lengths, or a value of the column.
        source, result: The scores.
        difference: Their difference, with its interval and the number of units.
    """

    name: str
    source: float
    result: float
    difference: Difference


def bin_lengths(lengths: Array, bins: int = 4) -> dict[str, Array]:
    """Divides rows by length, into ranges of about as many rows each, such as `13-24`.

    The bounds are quantiles. Rows of one length stay together, so there may be fewer ranges than asked for.

    Returns:
        For each range, from the shortest, `(rows,)`: true for the rows in it.
    """
    values = np.asarray(lengths)
    if not len(values) or bins < 1:
        raise ValueError(f"{len(values)} rows cannot be divided into {bins} ranges")
    bounds = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:], method="inverted_cdf"))
    found = np.searchsorted(bounds, values)
    masks = [found == number for number in range(len(bounds))]
    return {_name_range(values[mask].min(), values[mask].max()): mask for mask in masks}


def _name_range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}-{high}"


def group_column(values: Sequence[Any]) -> dict[str, Array]:
    """Divides rows by the value of a column, in the order of the values; of more than 20 values, the most frequent.

    Returns:
        For each value `(rows,)`: true for the rows with it.
    """
    names = np.array([str(value) for value in values])
    known, sizes = np.unique(names, return_counts=True)
    largest = np.sort(np.argsort(-sizes, kind="stable")[:MOST])
    return {str(known[number]): names == known[number] for number in largest}


def compare_slices(
    metric: Metric,
    source: Array,
    result: Array,
    references: Array,
    masks: Mapping[str, Array],
    *,
    clusters: Sequence[Any] | Array | None = None,
    **options: Any,
) -> list[Slice]:
    """Compares two models in each part of the units.

    Args:
        metric, source, result, references, clusters, options: Those of `compare_answers`.
        masks: What `bin_lengths` or `group_column` gives.
    """
    slices = []
    for name, mask in masks.items():
        if len(mask) != len(references):
            raise ValueError(f"there are {len(references)} units, and {len(mask)} in the division '{name}'")
        within = None if clusters is None else np.asarray(clusters)[mask]
        evidence = compare_answers(metric, source[mask], result[mask], references[mask], clusters=within, **options)
        slices.append(Slice(name, evidence.source, evidence.result, paired_difference(evidence)))
    return slices
