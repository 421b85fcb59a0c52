"""Gates on heads and neurons while a model trains, and those that close by a criterion's scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfcompress.models.architectures import unit_counts
from hfcompress.models.surgery import Keep
from hfcompress.pruning.gates import fold_gates, gated
from hfcompress.pruning.schedules import GrowthTimes
from hfcompress.training.overlay import TrainingOverlay, in_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.costs import Costs, Target


class UnitMasks(TrainingOverlay):
    """Masks on heads and neurons.

    Attributes:
        heads, neurons: How many each layer has.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.heads, self.neurons = unit_counts(model)

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """One tensor for each layer's weights, `(heads,)`, and one `(ffn,)`, in the mode that the module is in."""
        raise NotImplementedError

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            heads, neurons = (_like(model, gates) for gates in self.gates(progress))
        with gated(model, heads, neurons):
            yield

    def settle(self, model: PreTrainedModel) -> None:
        """The gates go into the columns of the linear layers that they feed."""
        self.eval()
        with torch.no_grad():
            fold_gates(model, *self.gates(1.0))

    def split(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """`(units,)`, all heads and then all neurons, as one tensor for each layer's heads and one for its neurons."""
        parts = list(flat.split([*self.heads, *self.neurons]))
        return parts[: len(self.heads)], parts[len(self.heads) :]

    def gates_of(self, keep: Sequence[Keep]) -> tuple[list[Tensor], list[Tensor]]:
        """1 for what is kept, else 0."""
        heads = [_ones_at(k.heads, n) for k, n in zip(keep, self.heads, strict=True)]
        return heads, [_ones_at(k.neurons, n) for k, n in zip(keep, self.neurons, strict=True)]


def _like(model: PreTrainedModel, gates: Sequence[Tensor]) -> list[Tensor]:
    return [gate.to(model.device, model.dtype) for gate in gates]


def _ones_at(index: Sequence[int], count: int) -> Tensor:
    gate = torch.zeros(count)
    gate[list(index)] = 1
    return gate


class GradualUnits(UnitMasks):
    """Gates that a criterion closes, more and more of them, as the training goes on.

    The cut grows as Zhu & Gupta 2017 (arXiv:1710.01878) let it, or linearly. Each time the model is scored under the
    gates, so that to a criterion that looks at gradients or activations a closed unit is worth nothing and stays
    closed; one that looks at weights alone may open it again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rescore: Callable[[PreTrainedModel, float], Sequence[Keep]],
        times: GrowthTimes,
    ) -> None:
        """Starts with every gate open.

        Args:
            model: The model that they go on.
            rescore: What stays of the model when that share of all the cutting is done; asked on every process alike.
            times: When the cut grows.
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
    """The units at which masks `(heads,)` and `(ffn,)` are true, layer by layer."""
    pairs = zip(heads, neurons, strict=True)
    return [Keep(tuple(h.nonzero().flatten().tolist()), tuple(n.nonzero().flatten().tolist())) for h, n in pairs]


def ease_target(target: Target, done: float) -> Target:
    """The target when so much of the cutting is done: everything may stay at 0, the budget holds at 1."""
    return replace(target, budget=target.costs.whole + done * (target.budget - target.costs.whole))


def expect_cost(costs: Costs, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Tensor:
    """Computes the expected cost of the units that stay, a scalar with gradients.

    Each block's costs are read at the expected count, linearly between two counts: where they are linear, which those
    of parameters, bytes and MACs are, that is the exact expectation.

    Args:
        costs: What units cost.
        heads, neurons: For each layer's weights the expected number that stays, scalars.
    """
    tables = [*costs.heads, *costs.neurons]
    counts = torch.stack([*heads, *(count / costs.group for count in neurons)])
    below = [min(int(n), max(len(t) - 2, 0)) for n, t in zip(counts.detach().tolist(), tables, strict=True)]
    base = sum(table[n] for table, n in zip(tables, below, strict=True))
    prices = [table[min(n + 1, len(table) - 1)] - table[n] for table, n in zip(tables, below, strict=True)]
    return costs.fixed + base + ((counts - counts.new_tensor(below)) * counts.new_tensor(prices)).sum()
