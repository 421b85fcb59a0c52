"""Measures how far the answers of a quantized model depend on the other rows of a batch.

Dynamic quantization takes the grid of an activation from the whole batch, so the same row can get another answer in
another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.measure.process import ModelProcess
from hfcompress.measure.rows import TOKENS, Rows
from hfcompress.models.artifact import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

SENSITIVITY_ROWS = 256
"""Rows that are answered again alone and in the order of the file."""


def measure_batch_sensitivity(process: ModelProcess, rows: Rows, outputs: Array, size: int) -> dict[str, Any] | None:
    """Answers the first rows again, alone and in batches in the order of the data, and compares.

    Args:
        process: The model.
        rows: The judged rows.
        outputs: Its outputs for all rows, answered in batches of rows of similar length, in the order of the data.
        size: Rows of a batch.

    Returns:
        `rows`, the number of answers; `answers_changed`, how many differ in at least one of the two (None for scores,
        which have no classes); `largest_difference` of a logit. None for a float model, whose answers must not depend
        on the batch (`quality.require_padding_unread`), and for a mask head, whose logits are not kept.
    """
    import numpy as np

    if process.artifact.dtype in FLOATS or rows.task.head == "mask":
        return None
    number = min(len(rows.encoded), SENSITIVITY_ROWS)
    few = rows.encoded.select(range(number))
    kept = sum(few["length"][:]) if rows.task.head in ("token", "span") else number
    before = outputs[:kept]
    ways = [[[n] for n in range(number)], [list(range(n, min(n + size, number))) for n in range(0, number, size)]]
    after = [process.logits(rows.batches(groups, (*TOKENS, "labels"))) for groups in ways]
    answers = [rows.task.judge(each, few)[0] for each in (before, *after)]
    return {
        "rows": len(answers[0]),
        "answers_changed": None if rows.task.type == "regression" else _count_changed(answers),
        "largest_difference": round(max(float(np.abs(other - before).max()) for other in after), 6),
    }


def _count_changed(answers: Sequence[Array]) -> int:
    """Counts the answers that differ from the first in any of the others."""
    import numpy as np

    first, *others = answers
    changed = [any(not np.array_equal(first[n], other[n]) for other in others) for n in range(len(first))]
    return sum(changed)
