"""Patient knowledge distillation: match the normalized hidden states of the first token, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.distillation.losses.base import make_projection_layer
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class PKD(Loss):
    """`L = Σ_m ‖h^S_m / ‖h^S_m‖ - h^T_g(m) / ‖h^T_g(m)‖‖²` of the first token; the mean is over rows.

    All mapped student layers count except the last, unless it is the only one. A shared projection is learned if the
    widths differ. The published code also takes the mean over layers and dimensions: its β is this weight times their
    number.
    """

    source: ClassVar[str] = "Patient KD, Sun et al. 2019, arXiv:1908.09355, eq. 7"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    first_token_only: ClassVar[bool] = True

    def make_projection(self, student: Shape, teacher: Shape) -> nn.Module | None:
        return make_projection_layer(student, teacher)

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        from torch.nn import functional as F

        total = step.student.logits.new_zeros(())
        last = len(step.student.hidden_states) - 1
        for m, g in [pair for pair in step.pairs if pair[0] != last] or step.pairs:
            student, teacher = step.student.hidden_states[m][:, 0], step.require_teacher().hidden_states[g][:, 0]
            if learned is not None:
                student = learned(student)
            apart = F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)
            total = total + apart.pow(2).sum(-1).mean()
        return total
