"""Each student layer's attention scores, before the softmax, against the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.base.shape import Shape
from hfcompress.losses.base import Loss, Step, masked_mse

if TYPE_CHECKING:
    from torch import Tensor, nn


class AttentionScores(Loss):
    """`L = Σ_m (1/h) Σ_i MSE(A^S_m,i, A^T_g(m),i)` with `A = Q Kᵀ / √d_k`, over pairs of real tokens.

    The reference code keeps padded query rows in the mean and masks keys only; here both sides are masked.
    """

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 7"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        heads = {layer.heads for layer in (*student.layers, *teacher.layers)}
        if len(heads) > 1:
            counts = ", ".join(map(str, sorted(heads)))
            return [
                f"the scores are compared head by head, and there are layers with {counts} heads; use hidden_states"
            ]
        return []

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        pairs = (step.mask.unsqueeze(2) & step.mask.unsqueeze(1)).unsqueeze(1)
        total = step.student.logits.new_zeros(())
        for m, g in step.pairs:
            student = _scores(step.student.queries[m], step.student.keys[m])
            teacher = _scores(step.taught().queries[g], step.taught().keys[g])
            total = total + masked_mse(student, teacher, pairs)
        return total


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
