"""Each student layer's output against that of the teacher layer it learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from hfcompress.base.shape import Shape
from hfcompress.losses.base import Loss, Step, masked_mse

if TYPE_CHECKING:
    from torch import Tensor, nn


class HiddenStates(Loss):
    """`L = Σ_m MSE(H^S_m W_h, H^T_g(m))` over real tokens; `W_h` is learned where the widths differ."""

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 8"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    projection: Literal["shared", "per_layer"] = "shared"
    """One `W_h` for all layers, as in the paper, or one each."""

    def learned(self, student: Shape, teacher: Shape) -> nn.Module | None:
        from torch import nn

        if student.hidden == teacher.hidden:
            return None
        count = 1 if self.projection == "shared" else len(student.layers)
        return nn.ModuleList(nn.Linear(student.hidden, teacher.hidden, bias=False) for _ in range(count))

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        mask, total = step.mask.unsqueeze(-1), step.student.logits.new_zeros(())
        for m, g in step.pairs:
            student = step.student.hidden_states[m]
            if learned is not None:
                student = learned[min(m, len(learned)) - 1](student)  # type: ignore[index,arg-type]
            total = total + masked_mse(student, step.taught().hidden_states[g], mask)
        return total
