"""Masks on heads and neurons while a model trains: the base class, and gates that a gradual schedule closes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfcompress.models.architectures import unit_counts
from hfcompress.models.surgery import Keep
from hfcompress.pruning.gates import apply_gates, fold_gates
from hfcompress.pruning.schedules import GrowthTimes
from hfcompress.training.overlay import TrainingOverlay, in_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.costs import Costs, Target


class UnitMasks(TrainingOverlay):
    """Masks on heads and neurons.

    Attributes:
        heads, neurons: The numbers of heads and of neurons of each layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.heads, self.neurons = unit_counts(model)

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Returns one tensor `(heads,)` and one `(ffn,)` for each layer's weights, by the mode of the module."""
        raise NotImplementedError

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            heads, neurons = (_match_model(model, gates) for gates in self.gates(progress))
        with apply_gates(model, heads, neurons):
            yield

    def settle(self, model: PreTrainedModel) -> None:
        """Multiplies the gates into the columns of the next linear layers."""
        self.eval()
        with torch.no_grad():
            fold_gates(model, *self.gates(1.0))

    def split(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Splits `(units,)`, all heads and then all neurons, into one tensor for each layer's heads and neurons."""
        parts = list(flat.split([*self.heads, *self.neurons]))
        return parts[: len(self.heads)], parts[len(self.heads) :]

    def gates_of(self, keep: Sequence[Keep]) -> tuple[list[Tensor], list[Tensor]]:
        """Makes gates: 1 for units that are kept, else 0."""
        heads = [_ones_at(k.heads, n) for k, n in zip(keep, self.heads, strict=True)]
        return heads, [_ones_at(k.neurons, n) for k, n in zip(keep, self.neurons, strict=True)]


def _match_model(model: PreTrainedModel, gates: Sequence[Tensor]) -> list[Tensor]:
    return [gate.to(model.device, model.dtype) for gate in gates]


def _ones_at(index: Sequence[int], count: int) -> Tensor:
    gate = torch.zeros(count)
    gate[list(index)] = 1
    return gate


class GradualUnits(UnitMasks):
    """Gates that a criterion closes step by step during the training.

    The cut grows by the cubic curve of Zhu & Gupta 2017 (arXiv:1710.01878), or linearly. The model is scored under the
    gates: for a criterion of gradients or activations a closed unit scores 0 and stays closed; a criterion of weights
    alone may open it again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rescore: Callable[[PreTrainedModel, float], Sequence[Keep]],
        times: GrowthTimes,
    ) -> None:
        """Opens every gate.

        Args:
            model: The model.
            rescore: Selects the units that stay when this share of the cutting is done; called on every process.
            times: The steps at which the cut grows.
        """
        super().__init__(model)
        self.rescore, self.times = rescore, times
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("flat", torch.ones(sum(self.heads) + sum(self.neurons)))
        self.share: Tensor
        self.flat: Tensor

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.split(self.flat)

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        share = self.times.new_share(step, steps, float(self.share))
        if share is None:
            return
        with in_eval_mode(model), self.lay_over(model, step / steps):
            heads, neurons = self.gates_of(self.rescore(model, share))
        self.flat.copy_(torch.cat([*heads, *neurons]))
        self.share.fill_(share)

    def keep(self) -> list[Keep]:
        return keep_where(*self.split(self.flat > 0))


def keep_where(heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> list[Keep]:
    """Lists the units at which masks `(heads,)` and `(ffn,)` are true, layer by layer."""
    pairs = zip(heads, neurons, strict=True)
    return [Keep(tuple(h.nonzero().flatten().tolist()), tuple(n.nonzero().flatten().tolist())) for h, n in pairs]


def ease_target(target: Target, done: float) -> Target:
    """Returns the target when the share `done` of the cutting is done: the whole model at 0, the budget at 1."""
    return replace(target, budget=target.costs.whole + done * (target.budget - target.costs.whole))


def expect_cost(costs: Costs, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Tensor:
    """Computes the expected cost of the units that stay, a scalar with gradients.

    Each block's costs are interpolated linearly at the expected count. For linear costs, such as parameters, bytes and
    MACs, this is the exact expectation.

    Args:
        costs: The costs of units.
        heads, neurons: For each layer's weights, the expected number that stays, scalars.
    """
    tables = [*costs.heads, *costs.neurons]
    counts = torch.stack([*heads, *(count / costs.group for count in neurons)])
    below = [min(int(n), max(len(t) - 2, 0)) for n, t in zip(counts.detach().tolist(), tables, strict=True)]
    base = sum(table[n] for table, n in zip(tables, below, strict=True))
    prices = [table[min(n + 1, len(table) - 1)] - table[n] for table, n in zip(tables, below, strict=True)]
    return costs.fixed + base + ((counts - counts.new_tensor(below)) * counts.new_tensor(prices)).sum()
