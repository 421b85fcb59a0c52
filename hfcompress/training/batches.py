"""Batches of encoded rows: the order of the rows, and the content of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import LengthGroupedSampler

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.distillation.teachers import TeacherEnsemble

SHARES = "shares"
"""The key of a batch for its weight in the step: a tensor `(losses,)`, see `weigh_batches`."""
TEACHERS = "teachers"
"""The key of a batch for the inputs of the teachers: a list of `TeacherBatch`. Without it, teachers read the student's
tokens."""


class SeededLengthSampler(LengthGroupedSampler):
    """Draws rows of similar length together, in an order that depends only on the seed and the epoch.

    A resumed run gets the same batches, and so does a run on more processes with the same global batch.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch; called by the data loader."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class Collator:
    """Makes a batch of rows, with the cached outputs of the teachers or the tokens of their own tokenizers."""

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, teachers: TeacherEnsemble | None, on_gpu: bool
    ) -> None:
        self.task, self.tokenizer, self.teachers = task, tokenizer, teachers
        self.multiple = 8 if on_gpu else None
        self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.task.batch(rows, self.tokenizer, self.multiple, self.epoch)
        index = batch.pop("index")
        if self.teachers is None:
            return batch
        for_teachers = self.teachers.prepare(index, batch["input_ids"].shape[1], self.multiple)
        return {**batch, TEACHERS: for_teachers} if for_teachers else batch


def make_batches(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """Yields all rows once, in batches of similar length."""
    for group in group_by_length(rows, batch_size):
        yield task.batch(rows.__getitems__(group), tokenizer)


def group_by_length(rows: datasets.Dataset, batch_size: int) -> list[list[int]]:
    """Sorts the numbers of all rows by length, and splits them into groups of `batch_size`."""
    lengths = rows["length"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
