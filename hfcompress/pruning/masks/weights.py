"""Masks on single weights of the layers' linear modules while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfcompress.models.linears import layer_linears
from hfcompress.pruning.schedules import GrowthTimes
from hfcompress.pruning.sparsity import apply_zeros, zeros
from hfcompress.training.overlay import TrainingOverlay, in_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.sparsity_pattern import Pattern


class WeightMasks(TrainingOverlay):
    """`W' = W ⊙ M` in each forward pass. What is covered keeps its value, and may come back."""

    def __init__(self, model: PreTrainedModel, pattern: Pattern) -> None:
        """Covers nothing yet.

        Args:
            model: The model that they go on.
            pattern: Where zeros are to be, and how many.

        Raises:
            HfcompressError: where the pattern does not tile a matrix.
        """
        super().__init__()
        self.names, self.pattern = [f"{name}.weight" for name in layer_linears(model)], pattern
        zeros(model, pattern, {name: model.get_parameter(name) for name in self.names})  # raises before any training

    def covers(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        """For each of `names` a mask of its weight's shape, in the mode that the module is in."""
        raise NotImplementedError

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        own = {name: model.get_parameter(name) for name in self.names}
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            masks = self.covers(model, progress)
            covered = [weight * mask.to(weight.dtype) for weight, mask in zip(own.values(), masks, strict=True)]
        try:
            for name, weight in zip(own, covered, strict=True):
                _put(model, name, weight)
            yield
        finally:
            for name, weight in own.items():
                _put(model, name, weight)

    def settle(self, model: PreTrainedModel) -> None:
        """What is covered becomes zero."""
        self.eval()
        apply_zeros(model, {name: mask > 0 for name, mask in zip(self.names, self.covers(model, 1.0), strict=True)})

    def cover_lowest(self, model: PreTrainedModel, scores: Mapping[str, Tensor], done: float) -> list[Tensor]:
        """For each of `names`, false at the weights that the pattern covers when so much of the cutting is done."""
        if done == 0:
            return [torch.ones_like(scores[name], dtype=torch.bool) for name in self.names]
        gone = zeros(model, self.pattern.at(done), scores)
        return [~gone[name] for name in self.names]


def _put(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Without a parameter's checks: a product of one takes its place for a while, and the order of names stays."""
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = weight  # type: ignore[assignment]


class GradualWeights(WeightMasks):
    """Weights that a criterion covers, more and more of them (Zhu & Gupta 2017, arXiv:1710.01878).

    The model is scored as it is without the masks, so a weight that is covered comes back where it matters again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pattern: Pattern,
        rescore: Callable[[PreTrainedModel], Mapping[str, Tensor]],
        times: GrowthTimes,
    ) -> None:
        """Covers nothing yet.

        Args:
            model: The model that they go on.
            pattern: Where zeros are to be, and how many in the end.
            rescore: Scores of each weight, by its name in the state dict; asked on every process alike.
            times: When the share of zeros grows.
        """
        super().__init__(model, pattern)
        self.rescore, self.times = rescore, times
        self.register_buffer("share", torch.zeros(()))
        self.share: Tensor
        for index, name in enumerate(self.names):
            self.register_buffer(f"mask_{index}", torch.ones_like(model.get_parameter(name), dtype=torch.bool))

    def covers(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        return [self.get_buffer(f"mask_{index}") for index in range(len(self.names))]

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        share = self.times.new_share(step, steps, float(self.share))
        if share is None:
            return
        with in_eval_mode(model):
            scores = self.rescore(model)
        for mask, chosen in zip(self.covers(model, step / steps), self.cover_lowest(model, scores, share), strict=True):
            mask.copy_(chosen)
        self.share.fill_(share)
