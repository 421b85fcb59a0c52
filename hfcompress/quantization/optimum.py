"""What the backends that use Optimum share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfcompress.models.dummy_inputs import DummyInputs

TASKS = {
    "sequence": "text-classification",
    "token": "token-classification",
    "span": "question-answering",
    "mask": "fill-mask",
}
"""Optimum's names for the task heads that read a text at once."""


def iterate_rows(batches: Iterable[DummyInputs], names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields each row alone as a graph's inputs `(1, length)`, without its padding, which would count in the ranges.

    Args:
        batches: Token arrays with their `attention_mask`.
        names: The graph's inputs; token types that the tokenizer does not give are zeros.
    """
    import numpy as np

    for batch in batches:
        zeros = np.zeros_like(batch["input_ids"])
        for row, mask in enumerate(batch["attention_mask"].astype(bool)):
            yield {name: batch.get(name, zeros)[row : row + 1, mask] for name in names}
