"""The last layer's attention and the relations among its values against the teacher's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hfcompress.base.shape import Shape
from hfcompress.losses.base import Loss, Pairs, Step, attention_problems, no_such_layer, relation_distance

if TYPE_CHECKING:
    from torch import Tensor, nn


class MiniLM(Loss):
    """`L = KL(P^T ‖ P^S) + KL(V^T ‖ V^S)` with `P = softmax(Q Kᵀ / √d)` and `V = softmax(V Vᵀ / √d)`, last layers.

    The mean over heads and a row's real tokens, then over rows.
    """

    source: ClassVar[str] = "MiniLM, Wang et al. 2020, arXiv:2002.10957, sections 3.1 and 3.2"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "values"})
    mapped: ClassVar[bool] = False

    teacher_layer: int | None = Field(default=None, ge=1)
    """The teacher's layer, from 1; the last where nothing is said."""

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        return ((len(student.layers), self.teacher_layer or len(teacher.layers)),)

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        ((m, g),) = self.layers(student, teacher, ())
        if g > len(teacher.layers):
            return no_such_layer(self.name, g, teacher)
        heads = {student.layers[m - 1].heads, teacher.layers[g - 1].heads}
        return attention_problems(self.name, student, teacher, heads)

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student, teacher = step.student, step.taught()
        m, g = max(student.queries), self.teacher_layer or max(teacher.queries)
        attention = relation_distance(
            (student.queries[m], student.keys[m]), (teacher.queries[g], teacher.keys[g]), step.mask
        )
        values = relation_distance((student.values[m],) * 2, (teacher.values[g],) * 2, step.mask)
        return ((attention + values) / step.mask.sum(1).clamp(min=1)).mean()
