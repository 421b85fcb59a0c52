"""What lies over a model while it trains; and gates on heads and neurons that close."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfcompress.models.architectures import unit_counts
from hfcompress.models.surgery import Keep
from hfcompress.pruning.gates import fold, gated
from hfcompress.pruning.growth import Curve, done_between
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
    def applied(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            heads, neurons = (_like(model, gates) for gates in self.gates(progress))
        with gated(model, heads, neurons):
            yield

    def settle(self, model: PreTrainedModel) -> None:
        """The gates go into the columns of the linear layers that they feed."""
        self.eval()
        with torch.no_grad():
            fold(model, *self.gates(1.0))

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


@dataclass(frozen=True)
class Due:
    """When a cut grows next, and to what share of it.

    Attributes:
        begin, end: Shares of the steps between which it grows.
        every: Steps from one time to the next.
        curve: How it grows.
    """

    begin: float
    end: float
    every: int
    curve: Curve

    def at(self, step: int, steps: int, share: float) -> float | None:
        """The new share after a step, None where it stays as it is."""
        progress = step / steps
        if step % self.every and progress < self.end:
            return None
        new = done_between(self.curve, progress, self.begin, self.end)
        return new if new > share else None


class Gradual(UnitMasks):
    """Gates that a criterion closes, more and more of them, as the training goes on.

    The cut grows as Zhu & Gupta 2017 (arXiv:1710.01878) let it, or linearly. Each time the model is scored under the
    gates, so that to a criterion that looks at gradients or activations a closed unit is worth nothing and stays
    closed; one that looks at weights alone may open it again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rescore: Callable[[PreTrainedModel, float], Sequence[Keep]],
        due: Due,
    ) -> None:
        """Starts with every gate open.

        Args:
            model: The model that they go on.
            rescore: What stays of the model when that share of all the cutting is done; asked on every process alike.
            due: When the cut grows.
        """
        super().__init__(model)
        self.rescore, self.due = rescore, due
        self.register_buffer("share", torch.zeros(()))
        self.register_buffer("flat", torch.ones(sum(self.heads) + sum(self.neurons)))
        self.share: Tensor
        self.flat: Tensor

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return self.split(self.flat)

    def stepped(self, model: PreTrainedModel, step: int, steps: int) -> None:
        share = self.due.at(step, steps, float(self.share))
        if share is None:
            return
        with in_eval_mode(model), self.applied(model, step / steps):
            heads, neurons = self.gates_of(self.rescore(model, share))
        self.flat.copy_(torch.cat([*heads, *neurons]))
        self.share.fill_(share)

    def keep(self) -> list[Keep]:
        return kept(*self.split(self.flat > 0))


def kept(heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> list[Keep]:
    """Layer by layer, the indices at which masks `(heads,)` and `(ffn,)` are true."""
    pairs = zip(heads, neurons, strict=True)
    return [Keep(tuple(h.nonzero().flatten().tolist()), tuple(n.nonzero().flatten().tolist())) for h, n in pairs]


def kept_within(heads: Sequence[Tensor], neurons: Sequence[Tensor], target: Target) -> list[Keep]:
    """The units of the highest scores that the budget has room for.

    Heads and groups of neurons are ranked together over all layers, a group by its mean score; within a layer the
    groups are of neighbours in rank. The highest come first, what is too dear for the room that is left is passed over,
    and what every layer keeps is counted before all else.

    Args:
        heads, neurons: Scores, one tensor for each layer's weights.
        target: The costs and the budget.
    """
    costs, least = target.costs, target.least
    blocks = [_Block(*block, 1) for block in zip(heads, costs.heads, least[0], strict=True)]
    blocks += [_Block(*block, costs.group) for block in zip(neurons, costs.neurons, least[1], strict=True)]
    room = target.budget - costs.fixed - sum(block.cost[block.least] for block in blocks)
    counts = _most(blocks, room)
    chosen = [tuple(b.order[: n * b.group].sort().values.tolist()) for b, n in zip(blocks, counts, strict=True)]
    return [Keep(h, n) for h, n in zip(chosen[: len(heads)], chosen[len(heads) :], strict=True)]


def partly(target: Target, done: float) -> Target:
    """The target when so much of the cutting is done: everything may stay at 0, the budget at 1."""
    return replace(target, budget=target.costs.whole + done * (target.budget - target.costs.whole))


class _Block:
    """One layer's heads, or its neurons in groups: the best first."""

    def __init__(self, scores: Tensor, cost: Sequence[float], least: int, group: int) -> None:
        values, self.order = scores.detach().double().cpu().sort(descending=True, stable=True)
        self.cost, self.least, self.group = cost, least, group
        self.values = values[: group * (len(cost) - 1)].reshape(-1, group).mean(-1)[least:]
        self.prices = torch.tensor(cost, dtype=torch.float64).diff()[least:]


def _most(blocks: Sequence[_Block], room: float) -> list[int]:
    """How many units of each block there is room for."""
    values = torch.cat([block.values for block in blocks])
    order = values.argsort(descending=True, stable=True)
    prices = torch.cat([block.prices for block in blocks])[order]
    owners = torch.cat([torch.full((len(b.values),), i) for i, b in enumerate(blocks)])[order]
    taken = torch.ones(len(order), dtype=torch.bool)
    room += 1e-9 * abs(room)  # sums are rounded
    while len(dear := ((prices * taken).cumsum(0) * taken > room).nonzero()):
        first = int(dear[0])
        taken[first:] &= owners[first:] != owners[first]
    counts = torch.bincount(owners[taken], minlength=len(blocks))
    return [block.least + int(count) for block, count in zip(blocks, counts, strict=True)]


def expected_cost(costs: Costs, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Tensor:
    """What keeping so many units is expected to cost, a scalar with gradients.

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
