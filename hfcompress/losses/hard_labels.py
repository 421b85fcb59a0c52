"""The task's own loss on the data's labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.losses.base import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class HardLabels(Loss):
    """`L = loss(z_S, y)`: cross-entropy for classes, tags, tokens and spans, mean squared error for scores."""

    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    needs_logits: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def units(self, batch: Units) -> Tensor:
        return batch.labelled if batch.task.by_token else batch.rows

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        assert step.labels is not None
        return step.task.loss(step.student.logits, step.labels, step.mask)
