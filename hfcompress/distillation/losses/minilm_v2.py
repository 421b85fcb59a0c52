"""Self-attention relation distillation (MiniLMv2): match query, key and value relations of one layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hfcompress.distillation.losses.base import LastLayer, relation_distance
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Step

if TYPE_CHECKING:
    from torch import Tensor, nn


class MiniLMv2(LastLayer):
    """`L = Σ_X α_X KL(R^T_X ‖ R^S_X)`, `R_X = softmax(X Xᵀ / √d_r)` for `X` = queries, keys, values of the last layer.

    All heads together are split again into relation heads of width `d_r`, so the student may have any number of heads.
    The mean is over the relation heads and real tokens of a row, then over rows. For a large teacher of 24 layers the
    paper uses layer 21.
    """

    source: ClassVar[str] = "MiniLMv2, Wang et al. 2021, arXiv:2012.15828, section 3.1"

    relation_heads: int | None = Field(default=None, ge=1)
    """The number of relation heads; it must divide both widths. The default is the number of attention heads of the
    teacher; the paper uses 48."""
    queries: float = Field(default=1.0, ge=0)
    """The weight `α` of the query relations."""
    keys: float = Field(default=1.0, ge=0)
    """The weight `α` of the key relations."""
    values: float = Field(default=1.0, ge=0)
    """The weight `α` of the value relations."""

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        found = super().problems(student, teacher)
        if found:
            return found
        ((m, g),) = self.layers(student, teacher, ())
        heads = self.relation_heads or teacher.layers[g - 1].heads
        # A divisor of the width of keys and values also divides the width of queries, which come in groups. If a
        # ranking over all layers cuts, the number of heads in the last one is not known: use a divisor of one head's
        # width.
        widths = [
            (s.layers[i - 1].heads // s.group if s.even else 1) * s.head_dim for s, i in ((student, m), (teacher, g))
        ]
        if all(width % heads == 0 for width in widths):
            return []
        common = math.gcd(*widths)
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        if not (student.even and teacher.even):
            return [
                f"the number of heads after the cut is not known yet, and {heads} relation heads do not divide the "
                f"width of one head; set `relation_heads` to one of {fitting}"
            ]
        return [
            f"{heads} relation heads do not divide the student's width {widths[0]} and the teacher's {widths[1]}; "
            f"set `relation_heads` to one of {fitting}"
        ]

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student, teacher = step.student, step.require_teacher()
        m, g = self.pair_of(step)
        heads = self.relation_heads or teacher.queries[g].shape[1]
        total = step.student.logits.new_zeros(())
        for weight, ours, theirs in (
            (self.queries, student.queries[m], teacher.queries[g]),
            (self.keys, student.keys[m], teacher.keys[g]),
            (self.values, student.values[m], teacher.values[g]),
        ):
            ours, theirs = _resplit(ours, heads), _resplit(theirs, heads)
            total = total + weight * relation_distance((ours, ours), (theirs, theirs), step.mask)
        return (total / step.mask.sum(1).clamp(min=1)).mean()


def _resplit(tensor: Tensor, heads: int) -> Tensor:
    """Splits `(batch, any heads, length, …)` again, into `(batch, heads, length, …)`."""
    return tensor.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
