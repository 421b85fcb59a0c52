"""Masks whose scores are learned straight through: what moves away from zero stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfcompress.pruning.allocation import keep_highest
from hfcompress.pruning.masks.units import UnitMasks, ease_target
from hfcompress.pruning.masks.weights import WeightMasks
from hfcompress.pruning.schedules import share_done_between

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.costs import Target
    from hfcompress.pruning.sparsity_pattern import Pattern


@dataclass(frozen=True)
class Movement:
    """How scores are learned, and what they cover.

    Attributes:
        learning_rate: Of the scores, which the schedule of the model's makes rise and fall.
        begin, end: Shares of the steps between which the cut, or the threshold, grows by the cubic law.
        threshold: τ in the end; None where the lowest scores are covered, as many as the cut asks for.
        penalty: λ in the end, of a threshold.
    """

    learning_rate: float
    begin: float
    end: float
    threshold: float | None
    penalty: float

    def done(self, progress: float) -> float:
        """How much of the cutting is done."""
        return share_done_between("cubic", progress, self.begin, self.end)

    def group(self, scores: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """The optimizer's group of the scores, without weight decay."""
        return [{"params": list(scores), "lr": self.learning_rate, "weight_decay": 0.0}]

    def passed(self, scores: Tensor, progress: float) -> Tensor:
        """True where `σ(S) > τ`."""
        assert self.threshold is not None
        return scores.detach().sigmoid() > self.threshold * self.done(progress)

    def pull(self, scores: Sequence[Tensor], progress: float) -> Tensor | None:
        """`λ mean σ(S)`, λ growing with τ; the mean of the tensors' means."""
        if self.threshold is None:
            return None
        means = torch.stack([s.sigmoid().mean() for s in scores if s.numel()])
        return self.penalty * self.done(progress) * means.mean()


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """The mask, whose gradient goes to the scores as it is."""
    return mask.to(scores.dtype) + (scores - scores.detach())


class MovementUnits(UnitMasks):
    """A score for each head and neuron (Lagunas et al. 2021): its mask is the gate on what feeds `W_o` or `W_2`.

    `∂L/∂S = ∂L/∂gate = Σ ∂L/∂W' ⊙ W` over the unit's columns.
    """

    def __init__(self, model: PreTrainedModel, target: Target, movement: Movement) -> None:
        super().__init__(model)
        self.target, self.movement = target, movement
        self.scores = nn.Parameter(torch.zeros(sum(self.heads) + sum(self.neurons)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.movement.group([self.scores])

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self.training and self.movement.threshold is not None:
            mask = self.movement.passed(self.scores, progress)
        else:
            heads, neurons = self.gates_of(self._kept(progress))
            mask = torch.cat([*heads, *neurons]).to(self.scores.device)
        return self.split(straight_through(mask, self.scores))

    def penalty(self, progress: float) -> Tensor | None:
        heads, neurons = self.split(self.scores)
        return self.movement.pull([*heads, *neurons], progress)

    def keep(self) -> list[Keep]:
        return self._kept(1.0)

    def _kept(self, progress: float) -> list[Keep]:
        return keep_highest(
            *self.split(self.scores.detach().cpu()), ease_target(self.target, self.movement.done(progress))
        )


class MovementWeights(WeightMasks):
    """A score for each weight, or for each of the pattern's blocks of weights (Sanh et al. 2020)."""

    def __init__(self, model: PreTrainedModel, pattern: Pattern, movement: Movement) -> None:
        super().__init__(model, pattern)
        self.movement = movement
        shapes = [model.get_parameter(name).shape for name in self.names]
        rows, columns = pattern.block
        self.scores = nn.ParameterList(torch.zeros(n // rows, m // columns) for n, m in shapes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.movement.group(list(self.scores))

    def covers(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        scores = [_spread(score, self.pattern.block) for score in self.scores]
        if self.training and self.movement.threshold is not None:
            masks = [self.movement.passed(score, progress) for score in scores]
        else:
            named = {name: score.detach() for name, score in zip(self.names, scores, strict=True)}
            masks = self.cover_lowest(model, named, self.movement.done(progress))
        return [straight_through(mask, score) for mask, score in zip(masks, scores, strict=True)]

    def penalty(self, progress: float) -> Tensor | None:
        return self.movement.pull(list(self.scores), progress)


def _spread(scores: Tensor, block: tuple[int, int]) -> Tensor:
    """A block's score at each of its weights."""
    return scores if block == (1, 1) else scores.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
