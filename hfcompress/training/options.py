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


def row_count(rows: Any) -> int | None:
    """How many encoded rows there are; None of a stream."""
    return len(rows) if hasattr(rows, "__len__") else None


class Train(StrictModel):
    """How to train. Batch size is per process; the rest means what `transformers.TrainingArguments` means by it."""

    epochs: float = Field(default=3.0, ge=0)
    """Passes over the train split; 0 trains nothing."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps, whatever `epochs` says."""
    learning_rate: float = Field(default=5e-5, gt=0)
    batch_size: int = Field(default=32, ge=1)
    """Rows a process and step."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Batches a step."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes after the warm-up."""
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Mixed precision; `auto` is bfloat16 on a GPU that has it, else float32."""
    length_grouping: bool = True
    """Batch rows of like length together, so that little is padded."""
    keep_best: bool = False
    """Score the dev split after each epoch and keep the best model instead of the last."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """Save the state to resume from every so many steps; the default is every epoch."""
    logging_steps: int = Field(default=50, ge=1)
    """Report the losses every so many steps."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare batches."""
    report_to: list[str] = []
    """Trackers, such as `tensorboard` or `wandb`."""

    def steps(self, rows: int | None, processes: int = 1) -> int | None:
        """Optimizer steps over `rows` rows; None where the number of rows is not known."""
        if self.epochs == 0:
            return 0
        if rows is None:
            return self.max_steps
        batches = math.ceil(rows / (self.batch_size * processes))
        per_epoch = max(math.ceil(batches / self.gradient_accumulation), 1)
        planned = math.ceil(per_epoch * self.epochs)
        return planned if self.max_steps is None else self.max_steps

    def until(self, steps: int) -> Self:
        """The same training, ended after so many steps as a longer one would be there: its rate has not fallen yet."""
        return self.model_copy(update={"max_steps": steps, "schedule": "constant", "keep_best": False})

    def problems(self, task: Task) -> list[Problem]:
        """What cannot work with the task's rows; the key starts with `train`."""
        if not task.streamed or self.max_steps is not None:
            return []
        message = "a corpus that is streamed has no known number of rows"
        return [Problem(message, "say how many steps to take", ("train", "max_steps"))]

    def masked_problems(self) -> list[Problem]:
        """What cannot work while masks close over the model or its weights are rounded."""
        if not self.keep_best:
            return []
        message = "the best model while masks close is one of the first, before they have closed"
        fix = "leave `keep_best` out of this training; it is for the one after the cut"
        return [Problem(message, fix, ("keep_best",))]

    def trackers_missing(self, key: Key = ()) -> list[Problem]:
        """Trackers that transformers does not know, or whose package is not installed.

        Args:
            key: The path to this block.
        """
        return [replace(p, key=(*key, *p.key)) for p in tracker_problems(self.report_to)] if self.report_to else []

    def rows_seen(self, rows: int, processes: int = 1) -> float:
        """Rows that training over `rows` rows looks at, each time it does."""
        if self.max_steps is None:
            return rows * self.epochs
        return float(self.max_steps * self.batch_size * self.gradient_accumulation * processes)
