"""Scores a model in memory, on one process, or on all processes together.

The Trainer's own evaluation loop is not used, for three reasons. Its batches depend on the number of processes, and
kernels round differently in other batches, so the choice of the best model would depend on it too. It gathers whole
logits, and a fill-mask head has one for each token of the vocabulary. And a teacher is scored before there is a
Trainer. Here the batches are the same on any number of processes, and each process predicts every n-th batch. The
predictions are joined in the order of the batches, so the score is the same to the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfcompress.measure.worker import reduce_logits
from hfcompress.models.forward import observe
from hfcompress.training.batches import group_by_length
from hfcompress.utils.distributed import process_state

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task

BATCH = 64
"""Rows in a forward pass."""


def score(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    shared: bool = False,
) -> float:
    """Computes a model's metric on encoded rows; the arguments are those of `predict`."""
    predictions, references, _ = judge(model, rows, tokenizer, task, shared=shared)
    return float(task.score(predictions, references))


def judge(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    shared: bool = False,
) -> tuple[NDArray[Any], NDArray[Any], datasets.Dataset]:
    """Computes predictions and references, and sorts the rows like them; the arguments are those of `predict`."""
    outputs, order = predict(model, rows, tokenizer, task, shared=shared)
    features = rows.select(order)
    return *task.judge(outputs, features), features


def predict(
    model: PreTrainedModel,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    shared: bool = False,
) -> tuple[NDArray[Any], list[int]]:
    """Runs a model in eval mode over encoded rows; then it is in its old mode again.

    Args:
        model: The model.
        rows: Encoded rows.
        tokenizer: The tokenizer that they were encoded with.
        task: The task.
        shared: True if all processes of a distributed run call this with the same model and rows. Each then runs its
            share of the batches, and all get all outputs. If false, this process runs all batches.

    Returns:
        The logits as `measure.worker.reduce_logits` reduces them, and the numbers of the rows in the same order.
    """
    state, groups = process_state(), group_by_length(rows, BATCH)
    first, step = (state.process_index, state.num_processes) if shared else (0, 1)
    if model.device.type != state.device.type:  # an 8-bit model cannot be moved, not even to where it is
        model.to(state.device)
    training, model = model.training, model.eval()
    outputs = {}
    with torch.inference_mode():
        for number in range(first, len(groups), step):
            batch = task.batch(rows.__getitems__(groups[number]), tokenizer)
            inputs = {name: value.to(model.device) for name, value in batch.items() if name not in ("labels", "index")}
            logits = observe(model, inputs).logits.float().cpu().numpy()
            outputs[number] = reduce_logits(logits, {name: value.numpy() for name, value in batch.items()}, task.head)
    model.train(training)
    if shared:
        outputs = _gather(outputs)
    return np.concatenate([outputs[number] for number in range(len(groups))]), [
        row for group in groups for row in group
    ]


def _gather(outputs: dict[int, NDArray[Any]]) -> dict[int, NDArray[Any]]:
    """Collects the outputs of all processes, by the numbers of the batches."""
    from accelerate.utils import gather_object

    return dict(gather_object(list(outputs.items())))
