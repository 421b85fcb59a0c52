"""What Optimum's exporters, of ONNX and of OpenVINO, have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfcompress.models.dummy_inputs import Probe

TASKS = {
    "sequence": "text-classification",
    "token": "token-classification",
    "span": "question-answering",
    "mask": "fill-mask",
}
"""What Optimum calls the kinds of head that read a text at once."""


def rows_alone(batches: Iterable[Probe], names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Each row as a graph's inputs `(1, length)`, without its padding, which would count in the ranges.

    Args:
        batches: Token arrays with their `attention_mask`.
        names: The graph's inputs; token types that a tokenizer left out are zeros.
    """
    import numpy as np

    for batch in batches:
        zeros = np.zeros_like(batch["input_ids"])
        for row, mask in enumerate(batch["attention_mask"].astype(bool)):
            yield {name: batch.get(name, zeros)[row : row + 1, mask] for name in names}
