"""Fake quantization with ranges that follow the batches by a moving average."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed

from hfcompress.models.linears import linears
from hfcompress.quantization.grids.ranges import LEVELS, Ranges, scale_and_zero_point
from hfcompress.quantization.qat.fake_quantization import FakeQuantization, Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTUM = 0.99
"""The share of a range that stays when a batch updates it."""


class MovingAverageRanges(FakeQuantization):
    """Rounds the inputs of linear layers to uint8, in ranges that follow those of the batches.

    Jacob et al. 2018, arXiv:1712.05877, section 3.1: each range is a moving average of the lowest and the highest value
    in the batches of a step, on all processes and without padding. Inputs beyond a range get no gradient.

    Attributes:
        read: Paths of the linear layers whose inputs are rounded.
        range: The lowest and the highest value of each, `(2, len(read))`.
        seen: The same of the batches since the last step; it includes 0.
    """

    range: Tensor
    seen: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Rounding,
        inputs: Ranges,
        freeze: float,
        table_bits: Literal[8, 4] | None = None,
    ) -> None:
        """Starts from calibrated ranges.

        Args:
            model: The model that it lies over.
            weights: Quantizes and dequantizes a linear layer's weights `(out_features, in_features)`.
            inputs: The calibrated ranges of the linear layers' inputs.
            freeze: The share of the steps after which ranges no longer change.
            table_bits: Bits of the word embeddings, see `grids.rowwise`; None if embeddings stay in float32.
        """
        super().__init__(weights, table_bits)
        self.freeze = freeze
        self.read = [path for path in linears(model) if path in inputs.inputs]
        self.register_buffer("range", torch.tensor([inputs.inputs[path] for path in self.read]).T.contiguous())
        self.register_buffer("seen", torch.zeros_like(self.range))
        self._mask: Tensor | None = None

    def input_roundings(self, progress: float) -> Mapping[str, Rounding]:
        follow = self.training and progress < self.freeze
        roundings: dict[str, Rounding] = {}
        for index, (path, bounds) in enumerate(self.ranges().inputs.items()):
            roundings[path] = partial(self._round, index if follow else None, *scale_and_zero_point(*bounds))
        return roundings

    def _before_forward(self, _model: Any, _inputs: Any, named: Mapping[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._mask = None if mask is None else mask.bool()

    def _round(self, index: int | None, step: float, zero: int, inputs: Tensor) -> Tensor:
        if index is not None:
            self._observe(index, inputs.detach())
        rounded: Tensor = _RoundInRange.apply(inputs, step, -zero, LEVELS - zero)
        return rounded

    def _observe(self, index: int, inputs: Tensor) -> None:
        if self._mask is not None and inputs.shape[:-1] == self._mask.shape:
            inputs = inputs.masked_fill(~self._mask[..., None], 0)
        low, high = inputs.aminmax()
        self.seen[0, index].clamp_(max=low)
        self.seen[1, index].clamp_(min=high)

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        if (step - 1) / steps < self.freeze:
            self.range.lerp_(_reduce_over_processes(self.seen), 1 - MOMENTUM)
            self.seen.zero_()

    def ranges(self) -> Ranges:
        return Ranges({path: (low, high) for path, (low, high) in zip(self.read, self.range.T.tolist(), strict=True)})


def _reduce_over_processes(seen: Tensor) -> Tensor:
    """Returns the ranges over the batches of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return seen
    both = torch.stack([seen[0], -seen[1]])
    distributed.all_reduce(both, distributed.ReduceOp.MIN)
    return torch.stack([both[0], -both[1]])


class _RoundInRange(torch.autograd.Function):
    """Rounds by `s clamp(round(x / s), first, last)`; clamped values get no gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: float, first: int, last: int) -> Tensor:
        nearest = (values / step).round_()
        on_grid = nearest.clamp(first, last)
        ctx.save_for_backward(nearest == on_grid)
        return on_grid.mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None
