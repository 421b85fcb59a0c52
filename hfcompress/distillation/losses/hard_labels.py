"""Supervised loss: train on the labels of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from hfcompress.data.class_weights import ClassWeights, class_weight_problems, weigh_classes
from hfcompress.data.task import IGNORED, Task
from hfcompress.training.loss import Loss, Step, Units
from hfcompress.utils.errors import Problem

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn


class HardLabels(Loss):
    """`L = loss(z_S, y)`: cross-entropy for classes, tags, tokens and spans, mean squared error for scores.

    With `class_weights` the mean of the cross-entropy is weighted: `Σ w_y loss / Σ w_y` over a batch.
    """

    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531"
    needs_logits: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    class_weights: ClassWeights = None
    """The weight of each class, for data in which some classes are rare: `balanced` (`n / (classes · count)`, from the
    train rows), or a mapping of class names to weights; other classes have weight 1."""

    def task_problems(self, task: Task, labels: Mapping[str, int] | None = None) -> list[Problem]:
        return class_weight_problems(self.class_weights, task, labels)

    def state_of(self, rows: datasets.Dataset, labels: Mapping[str, int]) -> Tensor | None:
        """Computes the weights of the classes."""
        return weigh_classes(self.class_weights, rows, labels)

    def units(self, batch: Units) -> Tensor:
        if batch.state is not None and batch.labels is not None:
            return batch.state.to(batch.labels.device)[batch.labels[batch.labels != IGNORED]].sum()
        return batch.labelled_tokens if batch.task.by_token else batch.rows

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        assert step.labels is not None
        weights = {} if step.state is None else {"weights": step.state}
        loss: Tensor = step.task.loss(step.student.logits, step.labels, step.mask, **weights)
        return loss
