"""Mask rearrangement and mask tuning: pruning after training, without an epoch.

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
from hfcompress.pruning.gates import gated
from hfcompress.pruning.layerwise import Rows, Run, runs, start

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.utils.distributed import AllReduce


LARGEST = 10.0
"""A scale of this size or more shows that the fit followed noise; its block keeps ones."""
DAMPING = 1e-2
"""How strongly scales are held at 1, as a share of the mean diagonal of the normal equations."""


# Rearrangement


def rearrange_masks(
    keep: Sequence[Keep],
    gradients: tuple[Sequence[Tensor], Sequence[Tensor]],
    all_reduce_sum: AllReduce = lambda _: None,
) -> list[Keep]:
    """Swaps units, as many of each block as before, until those that are cut matter least together.

    A block's importance is that of all it loses at once, `‖Σ_pruned ∂L/∂ξ‖²` over rows: the Fisher information with
    what units of a block have in common (eq. 7 and 8). One unit after another, the least important first, joins the
    pruned ones, and the one whose return lowers that sum most goes back.

    Args:
        keep: What stays, layer by layer.
        gradients: Each layer's `∂L/∂ξ` of heads, `(rows, head groups)`, and of neurons, `(rows, ffn)`; this process's
            rows.
        all_reduce_sum: Sums tensors over the processes, in place.
    """
    heads = [_swapped(kept.heads, rows, all_reduce_sum) for kept, rows in zip(keep, gradients[0], strict=True)]
    neurons = [_swapped(kept.neurons, rows, all_reduce_sum) for kept, rows in zip(keep, gradients[1], strict=True)]
    return [Keep(h, n) for h, n in zip(heads, neurons, strict=True)]


def _swapped(kept: tuple[int, ...], gradients: Tensor, all_reduce_sum: AllReduce) -> tuple[int, ...]:
    units = gradients.shape[1]
    fisher = (gradients.T.float() @ gradients.float()).double()
    all_reduce_sum([fisher])
    if len(kept) in (0, units):
        return kept
    fisher = fisher.cpu()
    squares = fisher.diagonal()
    pruned = torch.ones(units, dtype=torch.bool)
    pruned[list(kept)] = False
    # The gradient of what is pruned now, times each unit's.
    products = fisher[pruned].sum(0)
    for unit in sorted(kept, key=lambda k: float(squares[k])):
        pruned[unit] = True
        products += fisher[unit]
        # ‖s - g‖² = ‖s‖² - 2 s·g + ‖g‖² for each unit that could go back.
        after = (squares - 2 * products).masked_fill(~pruned, torch.inf)
        # Of equal ones the one that came, so that nothing is swapped for nothing.
        back = unit if after[unit] <= after.min() else int(after.argmin())
        pruned[back] = False
        products -= fisher[back]
    return tuple((~pruned).nonzero().flatten().tolist())


# Tuning


@dataclass(frozen=True)
class Gates:
    """What to multiply units by.

    Attributes:
        heads: One tensor for each layer's weights, `(head groups,)`; 0 for those that go.
        neurons: One tensor for each layer's weights, `(ffn,)`; 0 for those that go.
        errors: For each layer's weights, attention before FFN: the block's squared error before and after its tuning,
            as shares of what it should give.
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
    """Finds scales of the units that stay, so that each block's output, residual included, is what it was (eq. 9).

    Layer by layer, attention before FFN, each on what the layers before it give with their scales. It is a linear
    least-squares problem: `‖x̂ + Σ_u m_u W_u a_u - y‖²` over real tokens, where `x̂` is the pruned model's residual,
    `W_u a_u` what unit `u` adds to it, and `y` the unpruned model's sum. Its normal equations, `(W_uᵀW_v)(a_u a_vᵀ)`,
    need neither `W_u a_u` nor rows kept.

    Args:
        model: The model before the cut; left as it was.
        keep: What stays, layer by layer.
        batches: This process's encoded batches.
        all_reduce_sum: Sums tensors over the processes, in place.
    """
    told, errors = list(batches), []
    tuner = _Tuner(cut(model, keep), model, all_reduce_sum)
    pupil, taught = start(tuner.model, told), start(model, told)
    with torch.no_grad(), freeze(tuner.model), freeze(model):
        for index in range(len(keep)):
            errors += tuner.tune_layer(index, pupil, taught)
    counts = unit_counts(model)
    heads = [_spread(gate, kept.heads, n) for gate, kept, n in zip(tuner.heads, keep, counts[0], strict=True)]
    neurons = [_spread(gate, kept.neurons, n) for gate, kept, n in zip(tuner.neurons, keep, counts[1], strict=True)]
    return Gates(heads, neurons, errors)


def _spread(gate: Tensor, kept: Sequence[int], units: int) -> Tensor:
    """A gate for each unit of the whole block, from those of the units that stay."""
    spread = gate.new_zeros(units)
    spread[list(kept)] = gate
    return spread


def _linear(layer: nn.Module, path: str) -> nn.Linear:
    return layer.get_submodule(path)  # type: ignore[return-value]


class _Tuner:
    """The cut model, whose units get gates block after block, and the model that it is fitted to."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel, all_reduce_sum: AllReduce) -> None:
        self.model, self.teacher, self.all_reduce_sum = model, teacher, all_reduce_sum
        self.modules, self.stack = spec_of(model).modules, layers_of(model)
        device = next(model.parameters()).device
        self.heads, self.neurons = ([torch.ones(n, device=device) for n in units] for units in unit_counts(model))
        spec = spec_of(model)
        self.norm_before = spec.modern or spec.decoder

    def tune_layer(self, index: int, pupil: list[Rows], taught: list[Rows]) -> list[tuple[float, float]]:
        """Sets the layer's gates; the rows of both models are behind the layer then, where another one follows."""
        modules, errors = self.modules, []
        wanted = [self._sums(index, batch) for batch in taught]
        with gated(self.model, self.heads, self.neurons):
            for path, gate in ((modules.attention_output, self.heads[index]), (modules.ffn_out, self.neurons[index])):
                equations = _Equations(_linear(self.stack[index], path), gate)
                for batch, sums in zip(pupil, wanted, strict=True):
                    for number, run in enumerate(self._runs_before(path, index, batch) if len(gate) else ()):
                        missing = sums[path][number] - batch.tokens(self._residual(run, path))
                        equations.add(batch.tokens(run.inputs[path]), missing)
                self.all_reduce_sum(equations.tensors)
                errors.append(equations.solve_into(gate))
            for batch in pupil if index + 1 < len(self.stack) else ():
                for run in runs(self.model, index, batch):
                    batch.hidden = run.result
        return errors

    def _sums(self, index: int, batch: Rows) -> dict[str, list[Tensor]]:
        """The teacher's sums of residual and block, at real tokens, for each run; by the block's last module."""
        modules = self.modules
        found: dict[str, list[Tensor]] = {modules.attention_output: [], modules.ffn_out: []}
        for run in runs(self.teacher, index, batch, (modules.attention_output, modules.ffn_in, modules.ffn_out)):
            for path, sums in found.items():
                sums.append(batch.tokens(self._residual(run, path) + run.outputs[path]))
            batch.hidden = run.result
        return found

    def _runs_before(self, path: str, index: int, batch: Rows) -> Iterator[Run]:
        """The pruned model's layer, up to the input of a block's last module."""
        watched = (
            [path] if path == self.modules.attention_output else [self.modules.ffn_in, self.modules.attention_output]
        )
        return runs(self.model, index, batch, [*watched, path], stop=path)

    def _residual(self, run: Run, path: str) -> Tensor:
        """What a block's output is added to: the layer's input, or what the attention made of it."""
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
        """Inputs of the block's last module, `(tokens, width)`, and what it should give, `(tokens, hidden)`."""
        inputs, missing = inputs.float(), missing.float()
        if self.bias is not None:
            missing = missing - self.bias.float()
        self.products += inputs.T @ inputs
        self.crossed += missing.T @ inputs
        self.square += missing.square().sum(dtype=torch.float64)

    def solve_into(self, gate: Tensor) -> tuple[float, float]:
        """Sets the scales; the squared error before and after, as shares of what the block should give."""
        products = self.products * (self.weight.T @ self.weight)
        matrix = products.unflatten(0, self.units).unflatten(2, self.units).sum((1, 3))
        right = (self.weight * self.crossed).sum(0).unflatten(0, self.units).sum(1)
        ones = torch.ones_like(right)
        before = after = self._error(matrix, right, ones)
        if len(gate):
            held = matrix + (DAMPING * matrix.diagonal().mean().clamp(min=1e-30)).expand(len(gate)).diag()
            scales = 1 + torch.linalg.solve(held, right - matrix @ ones)
            if bool(scales.abs().max() < LARGEST):
                gate.copy_(scales)
                after = self._error(matrix, right, scales)
        return before, after

    def _error(self, matrix: Tensor, right: Tensor, scales: Tensor) -> float:
        square = float(self.square)
        found = square - 2 * float(scales @ right) + float(scales @ matrix @ scales)
        return max(found, 0.0) / max(square, 1e-30)
