"""Knowledge distillation (Hinton): match the teacher's output distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hfcompress.distillation.losses.base import NOTHING, by_rows, masked_mean, squared_difference
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class SoftLabels(Loss):
    """`L = T² KL(softmax(z_T / T) ‖ softmax(z_S / T))`; for a single output, the squared difference.

    The mean is over rows; for a token head, over labelled tokens; for a fill-mask head, over real tokens; for a span
    head, over starts and ends, whose distributions are over the real tokens. T² keeps the size of the gradient the same
    at every temperature.
    """

    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531, section 2.1"
    needs_logits: ClassVar[bool] = True

    loss: Literal["kl", "cross_entropy", "mse"] = "kl"
    """`cross_entropy` has the same gradient as `kl`; `mse` is the mean squared difference of the logits."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature T: above 1 the target distribution is softer. `mse` does not use it."""
    squared_temperature: bool = True
    """Multiply by T²."""
    masked_only: bool = False
    """Use only the masked tokens, for a fill-mask head."""
    tinybert_compat: bool = False
    """Compute the loss as TinyBERT's code of 2019: cross-entropy without T², with the mean also over classes. The
    classifier of that code also had a ReLU, which no stock task head has."""

    @model_validator(mode="after")
    def _check_compat(self) -> SoftLabels:
        if self.tinybert_compat and self.loss == "mse":
            raise ValueError("`tinybert_compat` is a cross-entropy; leave out `loss: mse`")
        return self

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        ours, theirs = (shape.vocab if shape.head == "mask" else shape.labels for shape in (student, teacher))
        return [] if ours == theirs else [f"the student has {ours} labels and the teacher {theirs}"]

    def units(self, batch: Units) -> Tensor:
        head = batch.task.head
        if head == "sequence" or (head == "span" and self.loss != "mse"):
            return batch.rows
        return self._mark_tokens(batch).sum().float()

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student, teacher = step.student.logits, step.require_teacher().logits
        head = step.task.head
        if self.loss == "mse" or (head == "sequence" and student.shape[-1] == 1):
            squares = squared_difference(student, teacher)
            return squares.mean() if head == "sequence" else masked_mean(squares, self._mark_tokens(step))
        if head == "span":
            student, teacher = (_over_tokens(logits, step.mask) for logits in (student, teacher))
        values = by_rows(self._divergence, student[0].numel(), student, teacher)
        return masked_mean(values, self._mark_tokens(step)) if head in ("token", "mask") else values.mean()

    def _mark_tokens(self, step: Step | Units) -> Tensor:
        """Returns a mask of the tokens that count: `(batch, length)`."""
        if step.labels is not None and (step.task.head == "token" or self.masked_only):
            return step.labels != -100
        return step.mask

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Computes the divergence of the distributions over the last axis, from logits."""
        from torch.nn import functional as F

        t = self.temperature
        ours, theirs = F.log_softmax(student.float() / t, -1), F.log_softmax(teacher.float() / t, -1)
        if self.tinybert_compat:
            return -(theirs.exp() * ours).mean(-1)
        if self.loss == "kl":
            found = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        else:
            found = -(theirs.exp() * ours).sum(-1)
        return found * t**2 if self.squared_temperature else found


def _over_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """Turns `(batch, length, 2)` into `(batch, 2, length)`, with no probability at padding."""
    return logits.transpose(1, 2).float().masked_fill(~mask.unsqueeze(1), NOTHING)
