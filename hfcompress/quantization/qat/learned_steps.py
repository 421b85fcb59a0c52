"""LSQ: fake quantization with learned step sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hfcompress.models.linears import linears
from hfcompress.quantization.grids.ranges import LARGEST, LEVELS, Ranges, scale_and_zero_point, weight_scales
from hfcompress.quantization.qat.fake_quantization import FakeQuantization, Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 1e-3
"""The learning rate of the logarithms of step sizes: about the relative change of a step size in one update."""


class LearnedStepSizes(FakeQuantization):
    """Rounds by `v̂ = s clamp(round(v / s), -Q, Q)`, with a step size s for each output channel and for each input.

    LSQ (Esser et al. 2020, arXiv:1902.08153), equations 1 to 3 and 5, with the gradient scale of section 2.2. Inputs
    keep the zero point of their calibrated range. The trained parameter is log s, so that Adam's updates are relative
    to s (Jain et al. 2020, arXiv:1903.08066, appendix B.3).

    Attributes:
        read: The index into `log_inputs`, by the paths of the linear layers whose inputs are rounded.
        log_inputs: log s of the inputs, one for all layers with the same start range: they read the same tensor.
        log_weights: log s of the output channels of all linear layers, `(Σ out_features,)`.
        held: Both, as they were at the last step before they froze.
    """

    held: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Ranges,
        freeze: float,
        table_bits: Literal[8, 4] | None = None,
    ) -> None:
        """Starts from calibrated ranges, and from step sizes that cover the largest weights.

        Args:
            model: The model that it lies over.
            inputs: The calibrated ranges of the linear layers' inputs.
            freeze: The share of the training steps after which step sizes no longer change.
            table_bits: Bits of the word embeddings, see `grids.rowwise`; None if embeddings stay in float32.
        """
        super().__init__(nn.Identity(), table_bits)
        self.freeze, layers = freeze, linears(model)
        self.paths, self.sizes = list(layers), [layer.out_features for layer in layers.values()]
        starts = {path: inputs.inputs[path] for path in layers if path in inputs.inputs}
        grids = {start: scale_and_zero_point(*start) for start in starts.values()}
        self.read = {path: list(grids).index(start) for path, start in starts.items()}
        self.zeros = [zero for _, zero in grids.values()]
        steps = torch.tensor([step for step, _ in grids.values()], device=model.device)
        self.log_inputs = nn.Parameter(steps.log())
        self.log_weights = nn.Parameter(torch.cat([weight_scales(layer.weight) for layer in layers.values()]).log())
        self.register_buffer("held", self._flat())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.log_inputs, self.log_weights], "lr": RATE, "weight_decay": 0.0}]

    def round_weights(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        steps = self.log_weights.exp().split(self.sizes)
        return {
            path: _round_to_step(layer.weight, own[:, None], -LARGEST, LARGEST)
            for (path, layer), own in zip(linears(model).items(), steps, strict=True)
        }

    def input_roundings(self, progress: float) -> Mapping[str, Rounding]:
        steps, zeros = self.log_inputs.exp().unbind(), self.zeros
        return {
            path: partial(_round_to_step, step=steps[index], first=-zeros[index], last=LEVELS - zeros[index])
            for path, index in self.read.items()
        }

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        if (step - 1) / steps < self.freeze:
            self.held.copy_(self._flat())
            return
        # DDP needs their gradients, and Adam's momentum would move them even without one.
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


def _round_to_step(values: Tensor, step: Tensor, first: int, last: int) -> Tensor:
    scale = (values.shape[-1] * max(-first, last)) ** -0.5
    rounded: Tensor = _RoundToStep.apply(values, step, first, last, scale)
    return rounded


class _RoundToStep(torch.autograd.Function):
    """Rounds by `v̂ = s clamp(round(v / s), first, last)` with LSQ's gradients, that of s scaled.

    A value that rounds to the first or last step counts as inside, as the largest weight of a channel does at first.
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
