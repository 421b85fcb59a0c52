"""Fake quantization whose step sizes are learned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hfcompress.models.linears import linears
from hfcompress.quantization.grids.ranges import LARGEST, LEVELS, Ranges, affine, weight_steps
from hfcompress.quantization.qat.fake_quantization import FakeQuantization, Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 1e-3
"""Learning rate of the logarithms of steps: about how much of itself a step may change by at once."""


class LearnedSteps(FakeQuantization):
    """`v̂ = s clamp(round(v / s), -Q, Q)` with a step for each output channel's weights, and one for a layer's inputs.

    LSQ (Esser et al. 2020, arXiv:1902.08153), equations 1 to 3 and 5, with the gradient scale of section 2.2. Inputs
    have the fixed zero point of their calibrated range. What is trained is log s, so that Adam's steps are relative to
    s (Jain et al. 2020, arXiv:1903.08066, appendix B.3).

    Attributes:
        read: By the paths of the linear layers whose inputs are rounded, which of `log_inputs` they have.
        log_inputs: One for all layers that start from the same range: those that read the same tensor.
        log_weights: `(Σ out_features,)` of all linear layers.
        held: Both, as of the last step before they froze.
    """

    held: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Ranges,
        freeze: float,
        table_bits: Literal[8, 4] | None = None,
    ) -> None:
        """Starts from ranges that were calibrated, and from steps that reach to the largest weights.

        Args:
            model: The model that it lies over.
            inputs: What the linear layers read.
            freeze: Share of the steps after which steps and ranges stay as they are.
            table_bits: Of the words' table, see `embedding_grid`; None where embedding tables stay in float.
        """
        super().__init__(nn.Identity(), table_bits)
        self.freeze, layers = freeze, linears(model)
        self.paths, self.sizes = list(layers), [layer.out_features for layer in layers.values()]
        starts = {path: inputs.inputs[path] for path in layers if path in inputs.inputs}
        grids = {start: affine(*start) for start in starts.values()}
        self.read = {path: list(grids).index(start) for path, start in starts.items()}
        self.zeros = [zero for _, zero in grids.values()]
        steps = torch.tensor([step for step, _ in grids.values()], device=model.device)
        self.log_inputs = nn.Parameter(steps.log())
        self.log_weights = nn.Parameter(torch.cat([weight_steps(layer.weight) for layer in layers.values()]).log())
        self.register_buffer("held", self._flat())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.log_inputs, self.log_weights], "lr": RATE, "weight_decay": 0.0}]

    def rounded(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        steps = self.log_weights.exp().split(self.sizes)
        return {
            path: _learned(layer.weight, own[:, None], -LARGEST, LARGEST)
            for (path, layer), own in zip(linears(model).items(), steps, strict=True)
        }

    def readers(self, progress: float) -> Mapping[str, Rounding]:
        steps, zeros = self.log_inputs.exp().unbind(), self.zeros
        return {
            path: partial(_learned, step=steps[index], first=-zeros[index], last=LEVELS - zeros[index])
            for path, index in self.read.items()
        }

    def stepped(self, model: PreTrainedModel, step: int, steps: int) -> None:
        if (step - 1) / steps < self.freeze:
            self.held.copy_(self._flat())
            return
        # Adam goes on by its momentum where there is no gradient, and DDP waits for one.
        inputs, weights = self.held.split([len(self.log_inputs), len(self.log_weights)])
        with torch.no_grad():
            self.log_inputs.copy_(inputs)
            self.log_weights.copy_(weights)

    def ranges(self) -> Ranges:
        steps = self.log_inputs.detach().exp().tolist()
        bounds = [(-zero * step, (LEVELS - zero) * step) for step, zero in zip(steps, self.zeros, strict=True)]
        weights = self.log_weights.detach().exp().cpu().split(self.sizes)
        inputs = {path: bounds[index] for path, index in self.read.items()}
        return Ranges(inputs, dict(zip(self.paths, weights, strict=True)))

    def _flat(self) -> Tensor:
        return torch.cat([self.log_inputs.detach(), self.log_weights.detach()])


def _learned(values: Tensor, step: Tensor, first: int, last: int) -> Tensor:
    scale = (values.shape[-1] * max(-first, last)) ** -0.5
    rounded: Tensor = _Learned.apply(values, step, first, last, scale)
    return rounded


class _Learned(torch.autograd.Function):
    """`v̂ = s clamp(round(v / s), first, last)` with the gradients of LSQ, that of s scaled.

    A value that rounds to the first or last step counts as within: the largest weight of a channel does at the start.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, first: float, last: float, scale: float) -> Tensor:
        wanted = values / step
        on_grid = wanted.round().clamp_(first, last)
        ctx.save_for_backward(wanted, step)
        ctx.first, ctx.last, ctx.scale = first, last, scale
        return on_grid.mul_(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted, step = ctx.saved_tensors
        nearest = wanted.round()
        on_grid = nearest.clamp(ctx.first, ctx.last)
        inside = nearest == on_grid
        slope = on_grid.sub_(wanted * inside).mul_(gradient)
        return gradient * inside, slope.sum_to_size(step.shape) * ctx.scale, None, None, None
