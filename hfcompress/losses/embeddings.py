"""The output of the embeddings against the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.base.shape import Shape
from hfcompress.losses.base import Loss, Step, masked_mse

if TYPE_CHECKING:
    from torch import Tensor, nn


class Embeddings(Loss):
    """`L = MSE(E^S W_e, E^T)` over real tokens; `W_e` is learned where the widths differ."""

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 9"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    mapped: ClassVar[bool] = False

    def learned(self, student: Shape, teacher: Shape) -> nn.Module | None:
        from torch import nn

        return None if student.hidden == teacher.hidden else nn.Linear(student.hidden, teacher.hidden, bias=False)

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student = step.student.hidden_states[0]
        if learned is not None:
            student = learned(student)
        return masked_mse(student, step.taught().hidden_states[0], step.mask.unsqueeze(-1))
