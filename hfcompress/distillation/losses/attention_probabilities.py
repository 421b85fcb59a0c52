"""Attention transfer (MobileBERT): match the attention probabilities, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from hfcompress.distillation.losses.base import all_heads, attention_problems, relation_distance
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class AttentionProbabilities(Loss):
    """`L = Σ_m (1/h) Σ_i KL(P^T_g(m),i ‖ P^S_m,i)` with `P = softmax(Q Kᵀ / √d)`.

    The mean is over the queries of real tokens.
    """

    source: ClassVar[str] = "MobileBERT, Sun et al. 2020, arXiv:2004.02984, section 3.5"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})

    distance: Literal["kl", "mse"] = "kl"
    """`mse` is the mean squared difference over pairs of real tokens."""

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        return attention_problems(self.name, student, teacher, all_heads(student, teacher))

    def units(self, batch: Units) -> Tensor:
        return batch.token_pairs if self.distance == "mse" else batch.tokens

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        squares, lengths = self.distance == "mse", step.mask.sum(1).float()
        total = step.student.logits.new_zeros(())
        for m, g in step.pairs:
            student = step.student.queries[m], step.student.keys[m]
            teacher = step.require_teacher().queries[g], step.require_teacher().keys[g]
            total = total + relation_distance(student, teacher, step.mask, squares).sum()
        return total / (lengths.pow(2) if squares else lengths).sum().clamp(min=1)
