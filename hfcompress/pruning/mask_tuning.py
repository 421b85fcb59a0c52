"""Mask rearrangement and mask tuning: improves a choice of units without training.

Kwon et al. 2022, arXiv:2204.09656: mask rearrangement (section 3.3) and mask tuning (section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.freezing import freeze
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.gates import apply_gates
from hfcompress.pruning.layerwise import LayerInputs, LayerRun, capture_layer_inputs, run_layer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.utils.distributed import AllReduce


LARGEST = 10.0
"""If a scale is this large or larger, the fit followed noise, and the block keeps scales of 1."""
DAMPING = 1e-2
"""The penalty on scales that differ from 1, as a share of the mean diagonal of the normal equations."""


# Rearrangement


def rearrange_masks(
    keep: Sequence[Keep],
    gradients: tuple[Sequence[Tensor], Sequence[Tensor]],
    all_reduce_sum: AllReduce = lambda _: None,
) -> list[Keep]:
    """Swaps units of a block, whose number stays the same, until the units that are cut matter least together.

    The importance of the pruned units of a block is `‖Σ_pruned ∂L/∂ξ‖²`, summed over rows: the Fisher information
    including the interaction of units (eq. 7 and 8). Each kept unit, the least important first, is pruned for a trial,
    and then the pruned unit whose return lowers this sum most is kept instead.

    Args:
        keep: The units that stay, layer by layer.
        gradients: Each layer's `∂L/∂ξ` of heads, `(rows, head groups)`, and of neurons, `(rows, ffn)`; this process's
            rows.
        all_reduce_sum: Sums tensors over the processes, in place.
    """
    heads = [_swap_units(kept.heads, rows, all_reduce_sum) for kept, rows in zip(keep, gradients[0], strict=True)]
    neurons = [_swap_units(kept.neurons, rows, all_reduce_sum) for kept, rows in zip(keep, gradients[1], strict=True)]
    return [Keep(h, n) for h, n in zip(heads, neurons, strict=True)]


def _swap_units(kept: tuple[int, ...], gradients: Tensor, all_reduce_sum: AllReduce) -> tuple[int, ...]:
    units = gradients.shape[1]
    fisher = (gradients.T.float() @ gradients.float()).double()
    all_reduce_sum([fisher])
    if len(kept) in (0, units):
        return kept
    fisher = fisher.cpu()
    squares = fisher.diagonal()
    pruned = torch.ones(units, dtype=torch.bool)
    pruned[list(kept)] = False
    # The gradient of all pruned units, times the gradient of each unit.
    products = fisher[pruned].sum(0)
    for unit in sorted(kept, key=lambda k: float(squares[k])):
        pruned[unit] = True
        products += fisher[unit]
        # ‖s - g‖² = ‖s‖² - 2 s·g + ‖g‖² for each unit that could return.
        after = (squares - 2 * products).masked_fill(~pruned, torch.inf)
        # Of equal units the one just pruned returns, so that no swap is useless.
        back = unit if after[unit] <= after.min() else int(after.argmin())
        pruned[back] = False
        products -= fisher[back]
    return tuple((~pruned).nonzero().flatten().tolist())


# Tuning


@dataclass(frozen=True)
class Gates:
    """The factors of all units.

    Attributes:
        heads: One tensor for each layer's weights, `(head groups,)`; 0 for heads that are cut.
        neurons: One tensor for each layer's weights, `(ffn,)`; 0 for neurons that are cut.
        errors: For each layer's weights, attention before FFN: the block's squared error before and after tuning,
            relative to the desired output.
    """

    heads: list[Tensor]
    neurons: list[Tensor]
    errors: list[tuple[float, float]]


def tune_masks(
    model: PreTrainedModel,
    keep: Sequence[Keep],
    batches: Iterable[Mapping[str, Tensor]],
    all_reduce_sum: AllReduce = lambda _: None,
) -> Gates:
    """Finds scales for the units that stay, so that each block's output plus residual is as before the cut (eq. 9).

    It works layer by layer, attention before FFN, on the outputs of earlier layers with their scales. Each block is a
    linear least-squares problem: `‖x̂ + Σ_u m_u W_u a_u - y‖²` over real tokens, where `x̂` is the pruned model's
    residual, `W_u a_u` the output of unit `u`, and `y` the unpruned model's sum. The normal equations,
    `(W_uᵀW_v)(a_u a_vᵀ)`, are summed up batch by batch, without storing `W_u a_u`.

    Args:
        model: The model before the cut; left as it was.
        keep: The units that stay, layer by layer.
        batches: This process's encoded batches.
        all_reduce_sum: Sums tensors over the processes, in place.
    """
    rows, errors = list(batches), []
    tuner = _Tuner(cut(model, keep), model, all_reduce_sum)
    pupil, taught = capture_layer_inputs(tuner.model, rows), capture_layer_inputs(model, rows)
    with torch.no_grad(), freeze(tuner.model), freeze(model):
        for index in range(len(keep)):
            errors += tuner.tune_layer(index, pupil, taught)
    counts = unit_counts(model)
    heads = [_scatter(gate, kept.heads, n) for gate, kept, n in zip(tuner.heads, keep, counts[0], strict=True)]
    neurons = [_scatter(gate, kept.neurons, n) for gate, kept, n in zip(tuner.neurons, keep, counts[1], strict=True)]
    return Gates(heads, neurons, errors)


def _scatter(gate: Tensor, kept: Sequence[int], units: int) -> Tensor:
    """Makes a gate for each unit of the whole block from the gates of the units that stay; the others get 0."""
    spread = gate.new_zeros(units)
    spread[list(kept)] = gate
    return spread


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    return layer.get_submodule(path)  # type: ignore[return-value]


class _Tuner:
    """Sets the gates of a cut model block by block, to fit the model before the cut."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, all_reduce_sum: AllReduce) -> None:
        self.model, self.teacher, self.all_reduce_sum = model, teacher, all_reduce_sum
        self.modules, self.stack = spec_of(model).modules, layers_of(model)
        device = next(model.parameters()).device
        self.heads, self.neurons = ([torch.ones(n, device=device) for n in units] for units in unit_counts(model))
        spec = spec_of(model)
        self.norm_before = spec.modern or spec.decoder

    def tune_layer(self, index: int, pupil: list[LayerInputs], taught: list[LayerInputs]) -> list[tuple[float, float]]:
        """Sets the layer's gates, and moves the rows of both models on to the next layer, if there is one."""
        modules, errors = self.modules, []
        wanted = [self._sum_teacher(index, batch) for batch in taught]
        with apply_gates(self.model, self.heads, self.neurons):
            for path, gate in ((modules.attention_output, self.heads[index]), (modules.ffn_out, self.neurons[index])):
                equations = _Equations(_linear(self.stack[index], path), gate)
                for batch, sums in zip(pupil, wanted, strict=True):
                    for number, run in enumerate(self._run_until(path, index, batch) if len(gate) else ()):
                        missing = sums[path][number] - batch.tokens(self._find_residual(run, path))
                        equations.add(batch.tokens(run.inputs[path]), missing)
                self.all_reduce_sum(equations.tensors)
                errors.append(equations.solve_into(gate))
            for batch in pupil if index + 1 < len(self.stack) else ():
                for run in run_layer(self.model, index, batch):
                    batch.hidden = run.result
        return errors

    def _sum_teacher(self, index: int, batch: LayerInputs) -> dict[str, list[Tensor]]:
        """Computes the teacher's residual plus block output at real tokens, for each run, by the last module."""
        modules = self.modules
        found: dict[str, list[Tensor]] = {modules.attention_output: [], modules.ffn_out: []}
        for run in run_layer(self.teacher, index, batch, (modules.attention_output, modules.ffn_in, modules.ffn_out)):
            for path, sums in found.items():
                sums.append(batch.tokens(self._find_residual(run, path) + run.outputs[path]))
            batch.hidden = run.result
        return found

    def _run_until(self, path: str, index: int, batch: LayerInputs) -> Iterator[LayerRun]:
        """Runs the pruned model's layer up to the input of a block's last module."""
        watched = (
            [path] if path == self.modules.attention_output else [self.modules.ffn_in, self.modules.attention_output]
        )
        return run_layer(self.model, index, batch, [*watched, path], stop=path)

    def _find_residual(self, run: LayerRun, path: str) -> Tensor:
        """Returns the residual, to which the output of a block is added."""
        if path == self.modules.attention_output:
            return run.hidden
        if self.norm_before:
            return run.hidden + run.outputs[self.modules.attention_output]
        return run.inputs[self.modules.ffn_in]


class _Equations:
    """The normal equations of one block's scales, summed over tokens in float64."""

    def __init__(self, module: nn.Linear, gate: Tensor) -> None:
        self.units = (len(gate), module.in_features // max(len(gate), 1))
        self.weight, self.bias = module.weight.double(), module.bias
        self.products, self.crossed, self.square = (
            torch.zeros(size, dtype=torch.float64, device=gate.device)
            for size in ((module.in_features,) * 2, (module.out_features, module.in_features), (1,))
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [self.products, self.crossed, self.square]

    def add(self, inputs: Tensor, missing: Tensor) -> None:
        """Adds inputs of the block's last module, `(tokens, width)`, and its desired outputs, `(tokens, hidden)`."""
        inputs, missing = inputs.float(), missing.float()
        if self.bias is not None:
            missing = missing - self.bias.float()
        self.products += inputs.T @ inputs
        self.crossed += missing.T @ inputs
        self.square += missing.square().sum(dtype=torch.float64)

    def solve_into(self, gate: Tensor) -> tuple[float, float]:
        """Solves for the scales; returns the squared error before and after, relative to the desired output."""
        products = self.products * (self.weight.T @ self.weight)
        matrix = products.unflatten(0, self.units).unflatten(2, self.units).sum((1, 3))
        right = (self.weight * self.crossed).sum(0).unflatten(0, self.units).sum(1)
        ones = torch.ones_like(right)
        before = after = self._find_error(matrix, right, ones)
        if len(gate):
            held = matrix + (DAMPING * matrix.diagonal().mean().clamp(min=1e-30)).expand(len(gate)).diag()
            scales = 1 + torch.linalg.solve(held, right - matrix @ ones)
            if bool(scales.abs().max() < LARGEST):
                gate.copy_(scales)
                after = self._find_error(matrix, right, scales)
        return before, after

    def _find_error(self, matrix: Tensor, right: Tensor, scales: Tensor) -> float:
        square = float(self.square)
        found = square - 2 * float(scales @ right) + float(scales @ matrix @ scales)
        return max(found, 0.0) / max(square, 1e-30)
