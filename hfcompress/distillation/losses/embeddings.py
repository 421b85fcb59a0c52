"""Embedding-layer distillation (TinyBERT): match the output of the embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.distillation.losses.base import (
    TINYBERT_PROJECTION,
    make_projection_layer,
    masked_mean,
    squared_difference,
)
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class Embeddings(Loss):
    """`L = MSE(E^S W_e, E^T)` over real tokens; `W_e` is learned if the widths differ."""

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 9"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})
    uses_layer_map: ClassVar[bool] = False

    tinybert_compat: bool = False
    """Compute the loss as TinyBERT's code of 2019: padded tokens count, and one projection with a bias is shared with
    `hidden_states`."""

    def make_projection(self, student: Shape, teacher: Shape) -> nn.Module | None:
        return make_projection_layer(student, teacher, self.tinybert_compat)

    def projection_name(self, key: str) -> str:
        return TINYBERT_PROJECTION if self.tinybert_compat else key

    def units(self, batch: Units) -> Tensor:
        return batch.places if self.tinybert_compat else batch.tokens

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        student = step.student.hidden_states[0]
        if learned is not None:
            student = learned(student)
        squares = squared_difference(student, step.require_teacher().hidden_states[0])
        return squares.mean() if self.tinybert_compat else masked_mean(squares, step.mask)
