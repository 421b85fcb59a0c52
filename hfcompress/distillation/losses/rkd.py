"""Relational knowledge distillation: match distances and angles between the rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from hfcompress.distillation.losses.base import in_float32
from hfcompress.training.loss import Loss, Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class RKD(Loss):
    """`L = λ_d Σ huber(ψ_d^S, ψ_d^T) + λ_a Σ huber(ψ_a^S, ψ_a^T)` over the last hidden states of a batch's rows.

    `ψ_d(i, j) = ‖x_i - x_j‖ / μ` of pairs of distinct rows, with the mean distance μ; `ψ_a(i, j, k)` of triplets is the
    cosine of the angle at `x_j`. Both sums are means here. Widths may differ. Only rows of one batch on one process are
    compared, not those of other batches of the same step; a batch of one row gives 0.
    """

    source: ClassVar[str] = "Relational KD, Park et al. 2019, arXiv:1904.05068, eq. 5 to 8"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    uses_layer_map: ClassVar[bool] = False

    of: Literal["cls", "mean"] = "cls"
    """The hidden state of a row: that of its first token, or the mean of its real tokens."""
    distance_weight: float = Field(default=1.0, ge=0)
    """The weight `λ_d` of the distances; the paper uses 25."""
    angle_weight: float = Field(default=2.0, ge=0)
    """The weight `λ_a` of the angles; the paper uses twice `λ_d`."""

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        outputs = (step.student, step.require_teacher())
        student, teacher = (self._rows(output.hidden_states[-1], step.mask) for output in outputs)
        with in_float32(student):
            (ours, our_angles), (theirs, their_angles) = _relations(student), _relations(teacher)
        rows = len(student)
        distance = _huber(ours, theirs) / max(rows * (rows - 1), 1)
        angle = _huber(our_angles, their_angles) / max(rows * (rows - 1) * (rows - 2), 1)
        return self.distance_weight * distance + self.angle_weight * angle

    def _rows(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.of == "cls":
            return states[:, 0].float()
        weights = mask.unsqueeze(-1).float()
        return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.smooth_l1_loss(student, teacher, reduction="sum")


def _relations(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Computes `ψ_d`, `(i, j)`, and `ψ_a`, `(j, i, k)`, of `(rows, width)`; 0 for a row with itself."""
    import torch

    apart = rows.unsqueeze(1) - rows.unsqueeze(0)
    squares = apart.pow(2).sum(-1)
    # The root's slope is infinite at 0, where a row meets itself.
    distinct = squares > 0
    lengths = squares.where(distinct, 1).sqrt()
    units = apart / lengths.unsqueeze(-1)
    others = 1 - torch.eye(len(rows), device=rows.device)
    angles = torch.einsum("ijd,kjd->jik", units, units) * others
    distances = lengths * distinct
    mean = distances.sum() / max(len(rows) * (len(rows) - 1), 1)
    return distances / mean.clamp(min=1e-12), angles
