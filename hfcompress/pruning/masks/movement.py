"""Movement masks: scores are trained by a straight-through estimator, and weights that move away from zero stay."""

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
    from hfcompress.pruning.sparsity_pattern import SparsityPattern


@dataclass(frozen=True)
class MovementSettings:
    """The settings of movement masks.

    Attributes:
        learning_rate: Learning rate of the scores; it follows the model's schedule.
        begin, end: Shares of the steps between which the cut, or the threshold, grows by the cubic curve.
        threshold: τ at the end; None to mask the lowest scores, as many as the cut needs.
        penalty_factor: λ at the end, for a threshold.
    """

    learning_rate: float
    begin: float
    end: float
    threshold: float | None
    penalty_factor: float

    def share_done(self, progress: float) -> float:
        """Computes the share of the cutting that is done."""
        return share_done_between("cubic", progress, self.begin, self.end)

    def parameter_group(self, scores: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Makes the optimizer group of the scores, without weight decay."""
        return [{"params": list(scores), "lr": self.learning_rate, "weight_decay": 0.0}]

    def passes_threshold(self, scores: Tensor, progress: float) -> Tensor:
        """Makes a mask that is true where `σ(S) > τ`."""
        assert self.threshold is not None
        return scores.detach().sigmoid() > self.threshold * self.share_done(progress)

    def penalty(self, scores: Sequence[Tensor], progress: float) -> Tensor | None:
        """Computes `λ mean σ(S)`, the mean of the tensors' means; λ grows with τ. None without a threshold."""
        if self.threshold is None:
            return None
        means = torch.stack([s.sigmoid().mean() for s in scores if s.numel()])
        return self.penalty_factor * self.share_done(progress) * means.mean()


def pass_gradient(mask: Tensor, scores: Tensor) -> Tensor:
    """Returns the mask with the gradient passed to the scores unchanged."""
    return mask.to(scores.dtype) + (scores - scores.detach())


class MovementUnits(UnitMasks):
    """Movement masks on heads and neurons (Lagunas et al. 2021): each has a score, and its mask gates its output.

    `∂L/∂S = ∂L/∂gate = Σ ∂L/∂W' ⊙ W` over the unit's columns of `W_o` or `W_2`.
    """

    def __init__(self, model: PreTrainedModel, target: Target, movement: MovementSettings) -> None:
        super().__init__(model)
        self.target, self.movement = target, movement
        self.scores = nn.Parameter(torch.zeros(sum(self.heads) + sum(self.neurons)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.movement.parameter_group([self.scores])

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self.training and self.movement.threshold is not None:
            mask = self.movement.passes_threshold(self.scores, progress)
        else:
            heads, neurons = self.gates_of(self._select_units(progress))
            mask = torch.cat([*heads, *neurons]).to(self.scores.device)
        return self.split(pass_gradient(mask, self.scores))

    def penalty(self, progress: float) -> Tensor | None:
        heads, neurons = self.split(self.scores)
        return self.movement.penalty([*heads, *neurons], progress)

    def keep(self) -> list[Keep]:
        return self._select_units(1.0)

    def _select_units(self, progress: float) -> list[Keep]:
        return keep_highest(
            *self.split(self.scores.detach().cpu()), ease_target(self.target, self.movement.share_done(progress))
        )


class MovementWeights(WeightMasks):
    """Movement masks on single weights, or on the pattern's blocks of weights (Sanh et al. 2020)."""

    def __init__(self, model: PreTrainedModel, pattern: SparsityPattern, movement: MovementSettings) -> None:
        super().__init__(model, pattern)
        self.movement = movement
        shapes = [model.get_parameter(name).shape for name in self.names]
        rows, columns = pattern.block
        self.scores = nn.ParameterList(torch.zeros(n // rows, m // columns) for n, m in shapes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.movement.parameter_group(list(self.scores))

    def make_masks(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        scores = [_expand_blocks(score, self.pattern.block) for score in self.scores]
        if self.training and self.movement.threshold is not None:
            masks = [self.movement.passes_threshold(score, progress) for score in scores]
        else:
            named = {name: score.detach() for name, score in zip(self.names, scores, strict=True)}
            masks = self.mask_lowest(model, named, self.movement.share_done(progress))
        return [pass_gradient(mask, score) for mask, score in zip(masks, scores, strict=True)]

    def penalty(self, progress: float) -> Tensor | None:
        return self.movement.penalty(list(self.scores), progress)


def _expand_blocks(scores: Tensor, block: tuple[int, int]) -> Tensor:
    """Repeats a block's score for each of its weights."""
    return scores if block == (1, 1) else scores.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
