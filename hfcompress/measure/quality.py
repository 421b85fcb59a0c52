"""A model's answers to the judged rows, and the check that padding does not change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfcompress.measure.answers import Answer
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.rows import TOKENS, Rows
from hfcompress.models.artifact import Artifact
from hfcompress.models.weights import first_not_finite
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUALITY_BATCH = {"sequence": 32, "token": 32, "span": 32, "mask": 8}
"""Rows in a batch when quality is measured; the logits of a mask head span the whole vocabulary for each token."""

PADDED_ROWS = 8
"""Rows that a model gets alone and, padded, in one batch."""
PADDING_TOLERANCE = 1e-3
"""Largest difference of these outputs, relative to the largest or 1: kernels round differently for other lengths."""


def judge_rows(process: ModelProcess, rows: Rows) -> Answer:
    """Computes a model's answers to all rows, in the order of the data."""
    return judge_outputs(compute_outputs(process, rows), rows)


def compute_outputs(process: ModelProcess, rows: Rows) -> NDArray[Any]:
    """Computes a model's outputs for all rows, in the order of the data; rows of similar length share a batch.

    Raises:
        HfcompressError: if a logit of the model is not finite.
    """
    import numpy as np

    task, lengths = rows.task, np.asarray(rows.encoded["length"][:])
    order, size = np.argsort(lengths, kind="stable"), QUALITY_BATCH[task.head]
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    outputs = process.logits(rows.batches(groups, (*TOKENS, "labels")))
    if not np.isfinite(outputs).all():
        raise HfcompressError(
            f"{process.artifact.path} answers with values that are not finite{_name_odd_tensor(process.artifact)}",
            "train or quantize the model again, or start from an earlier checkpoint",
        )
    return _restore_order(outputs, order, lengths, by_token=task.head in ("token", "span"))


def judge_outputs(outputs: NDArray[Any], rows: Rows) -> Answer:
    """Turns the outputs for all rows into answers."""
    import numpy as np

    task, lengths = rows.task, np.asarray(rows.encoded["length"][:])
    predictions, references = task.judge(outputs, rows.encoded)
    classes = task.head == "sequence" and task.type != "regression"
    return Answer(predictions, references, outputs if classes else None, lengths if task.head != "span" else None)


def _restore_order(outputs: NDArray[Any], order: NDArray[Any], lengths: NDArray[Any], by_token: bool) -> NDArray[Any]:
    """Outputs in the order of the data.

    Args:
        outputs: One a row, or one a token of each row, in the order in which the rows were read.
        order: The numbers of the rows in that order.
        lengths: Tokens of each row, in the order of the data.
        by_token: True for outputs of tokens.
    """
    import numpy as np

    place = np.argsort(order)
    if not by_token:
        return outputs[place]
    parts = np.split(outputs, np.cumsum(lengths[order])[:-1])
    return np.concatenate([parts[number] for number in place])


def require_padding_unread(process: ModelProcess, rows: Rows) -> None:
    """Requires that a float model gives a few rows of all lengths the same logits alone and padded to the longest.

    It passes every quantized model, because the grid of its inputs can depend on the whole batch.

    Args:
        process: The model.
        rows: The judged rows.

    Raises:
        HfcompressError: for a model whose logits depend on padding.
    """
    import numpy as np

    if process.dtype != "float32":
        return
    order = np.argsort(np.asarray(rows.encoded["length"][:]), kind="stable")
    few = [int(order[i]) for i in sorted({*np.linspace(0, len(order) - 1, PADDED_ROWS).round().astype(int)})]
    names = (*TOKENS, "labels")
    alone, together = (process.logits(rows.batches(groups, names)) for groups in ([[row] for row in few], [few]))
    if rows.task.head == "mask":  # the count of right answers may change with a tie, so only the loss is compared
        alone, together = alone[:, 2], together[:, 2]
    difference = float(np.abs(alone - together).max(initial=0.0)) / max(1.0, float(np.abs(alone).max(initial=0.0)))
    if not difference <= PADDING_TOLERANCE:
        raise HfcompressError(
            f"{process.artifact.path} answers differently (by {difference:.2g}) once a row is padded to the length of "
            "another, so its quality would depend on the batch",
            "see which token its config.json and its tokenizer pad with, and on which side the model was trained to "
            "be padded; hfcompress pads on the right",
        )


def _name_odd_tensor(artifact: Artifact) -> str:
    """Names the first weights of an ONNX graph that are not finite; loading has checked those of a PyTorch model."""
    found = first_not_finite(artifact.path / artifact.choice.file) if artifact.runtime == "onnx" else None
    return f": its weights {found} are not" if found else ""
