"""Cosine distance between the last hidden states, as in DistilBERT."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.distillation.losses.base import cosine_distance, masked_mean
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class Cosine(Loss):
    """`L = mean over real tokens of 1 - cos(h_S, h_T)`, at the last layer."""

    source: ClassVar[str] = "DistilBERT, Sanh et al. 2019, arXiv:1910.01108, section 3"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    uses_layer_map: ClassVar[bool] = False

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        if student.hidden == teacher.hidden:
            return []
        widths = f"the student's is {student.hidden} and the teacher's {teacher.hidden}"
        return [f"cosine needs equal widths, {widths}; use hidden_states with `distance: cosine`, which projects"]

    def units(self, batch: Units) -> Tensor:
        return batch.tokens

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student, teacher = step.student.hidden_states[-1], step.require_teacher().hidden_states[-1]
        return masked_mean(cosine_distance(student, teacher), step.mask)
