"""The `train:` block, the same in every stage that trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from hfcompress.training.trackers import tracker_problems
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task


def count_rows(rows: Any) -> int | None:
    """Counts encoded rows; None for a stream."""
    return len(rows) if hasattr(rows, "__len__") else None


class Train(StrictModel):
    """The options of a training. `batch_size` is per process; the others are as in `transformers.TrainingArguments`."""

    epochs: float = Field(default=3.0, ge=0)
    """Passes over the train split; 0 trains nothing."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this number of optimizer steps; it overrides `epochs`."""
    learning_rate: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch, on each process."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches of one optimizer step, on each process."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The course of the learning rate after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Mixed precision; `auto` is bfloat16 on a GPU that has it, else float32."""
    length_grouping: bool = True
    """Put rows of similar length into one batch, which saves padding."""
    keep_best: bool = False
    """Score the dev split after each epoch and keep the best model instead of the last."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """The number of steps between two checkpoints; by default, one is saved after each epoch."""
    logging_steps: int = Field(default=50, ge=1)
    """The number of steps between two log lines of the losses."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches."""
    report_to: list[str] = []
    """Trackers, such as `tensorboard` or `wandb`."""

    def steps(self, rows: int | None, processes: int = 1) -> int | None:
        """Counts the optimizer steps over `rows` rows; None if the number of rows is not known."""
        if self.epochs == 0:
            return 0
        if rows is None:
            return self.max_steps
        batches = math.ceil(rows / (self.batch_size * processes))
        per_epoch = max(math.ceil(batches / self.gradient_accumulation), 1)
        planned = math.ceil(per_epoch * self.epochs)
        return planned if self.max_steps is None else self.max_steps

    def until(self, steps: int) -> Self:
        """Returns the options of the first `steps` steps, with a constant learning rate after the warm-up."""
        return self.model_copy(update={"max_steps": steps, "schedule": "constant", "keep_best": False})

    def problems(self, task: Task) -> list[Problem]:
        """Lists the problems with the task's rows; the keys start with `train`."""
        if not task.is_streamed or self.max_steps is not None:
            return []
        message = "a corpus that is streamed has no known number of rows"
        return [Problem(message, "give the number of steps", ("train", "max_steps"))]

    def masked_problems(self) -> list[Problem]:
        """Lists the problems with an overlay that changes the model step by step."""
        if not self.keep_best:
            return []
        message = "the best model while masks close is one of the first, before they have closed"
        fix = "leave `keep_best` out of this training; it is for the one after the cut"
        return [Problem(message, fix, ("keep_best",))]

    def trackers_missing(self, key: Key = ()) -> list[Problem]:
        """Lists the trackers that transformers does not know, or that are not installed.

        Args:
            key: The path to this block.
        """
        return [replace(p, key=(*key, *p.key)) for p in tracker_problems(self.report_to)] if self.report_to else []

    def count_rows_read(self, rows: int, processes: int = 1) -> float:
        """Counts the rows that a training over `rows` rows reads; a row that is read again counts again."""
        if self.max_steps is None:
            return rows * self.epochs
        return float(self.max_steps * self.batch_size * self.gradient_accumulation * processes)
