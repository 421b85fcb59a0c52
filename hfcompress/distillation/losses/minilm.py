"""Self-attention distillation (MiniLM): match attention and value relations of the last layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.distillation.losses.base import LastLayer, attention_problems, relation_distance
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class MiniLM(LastLayer):
    """`L = KL(P^T ‖ P^S) + KL(V^T ‖ V^S)` with `P = softmax(Q Kᵀ / √d)` and `V = softmax(V Vᵀ / √d)` (last layers).

    The mean is over the heads and real tokens of a row, then over rows.
    """

    source: ClassVar[str] = "MiniLM, Wang et al. 2020, arXiv:2002.10957, sections 3.1 and 3.2"

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        found = super().problems(student, teacher)
        if found:
            return found
        ((m, g),) = self.layers(student, teacher, ())
        heads = {student.layers[m - 1].heads, teacher.layers[g - 1].heads}
        return attention_problems(self.name, student, teacher, heads)

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student, teacher = step.student, step.require_teacher()
        m, g = self.pair_of(step)
        attention = relation_distance(
            (student.queries[m], student.keys[m]), (teacher.queries[g], teacher.keys[g]), step.mask
        )
        values = relation_distance((student.values[m],) * 2, (teacher.values[g],) * 2, step.mask)
        return ((attention + values) / step.mask.sum(1).clamp(min=1)).mean()
