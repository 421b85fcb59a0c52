"""The teacher's predictions as targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hfcompress.base.shape import Shape
from hfcompress.losses.base import Loss, Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class SoftLabels(Loss):
    """`L = T² KL(softmax(z_T / T) || softmax(z_S / T))`, the mean over rows; for one output, the squared difference.

    T² keeps the size of the gradient the same for every temperature.
    """

    source: ClassVar[str] = "Hinton et al. 2015, arXiv:1503.02531, section 2.1"
    needs_logits: ClassVar[bool] = True

    temperature: float = Field(default=1.0, gt=0)
    """T: above 1 the target distribution is softer."""
    squared_temperature: bool = True
    """Multiply by T²; TinyBERT's code does not."""

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        if student.labels != teacher.labels:
            return [f"the student has {student.labels} labels and the teacher {teacher.labels}"]
        return []

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        from torch.nn import functional as F

        student, teacher = step.student.logits.float(), step.taught().logits.float()
        if student.shape[-1] == 1:
            return F.mse_loss(student, teacher)
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1), log_target=True, reduction="batchmean"
        )
        return divergence * t**2 if self.squared_temperature else divergence
