"""Masks on single weights of the layers' linear modules while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hfcompress.models.linears import layer_linears
from hfcompress.pruning.schedules import GrowthTimes
from hfcompress.pruning.sparsity import apply_zeros, select_zeros
from hfcompress.training.overlay import TrainingOverlay, in_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.sparsity_pattern import SparsityPattern


class WeightMasks(TrainingOverlay):
    """Masks on single weights: `W' = W ⊙ M` in each forward pass. A masked weight keeps its value and may return."""

    def __init__(self, model: PreTrainedModel, pattern: SparsityPattern) -> None:
        """Makes masks that mask nothing yet.

        Args:
            model: The model.
            pattern: The number and the places of the zeros.

        Raises:
            HfcompressError: if the pattern does not divide a matrix.
        """
        super().__init__()
        self.names, self.pattern = [f"{name}.weight" for name in layer_linears(model)], pattern
        select_zeros(
            model, pattern, {name: model.get_parameter(name) for name in self.names}
        )  # raises before any training

    def make_masks(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        """Makes a mask of the weight's shape for each of `names`, by the mode of the module."""
        raise NotImplementedError

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        own = {name: model.get_parameter(name) for name in self.names}
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            masks = self.make_masks(model, progress)
            covered = [weight * mask.to(weight.dtype) for weight, mask in zip(own.values(), masks, strict=True)]
        try:
            for name, weight in zip(own, covered, strict=True):
                _replace_weight(model, name, weight)
            yield
        finally:
            for name, weight in own.items():
                _replace_weight(model, name, weight)

    def settle(self, model: PreTrainedModel) -> None:
        """Sets the masked weights to zero."""
        self.eval()
        apply_zeros(model, {name: mask > 0 for name, mask in zip(self.names, self.make_masks(model, 1.0), strict=True)})

    def mask_lowest(self, model: PreTrainedModel, scores: Mapping[str, Tensor], done: float) -> list[Tensor]:
        """Makes masks that are false at the lowest scores, when the share `done` of the pattern's zeros is set."""
        if done == 0:
            return [torch.ones_like(scores[name], dtype=torch.bool) for name in self.names]
        gone = select_zeros(model, self.pattern.at(done), scores)
        return [~gone[name] for name in self.names]


def _replace_weight(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Puts a computed tensor in the place of a parameter, or the parameter back.

    `torch.func.functional_call` swaps parameters for one call that it makes itself; here the objective and the
    evaluation call the model, inside the context. `torch.nn.utils.parametrize` renames parameters, and optimizer
    groups, checkpoints and saved models know them by name.
    """
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = weight  # type: ignore[assignment]


class GradualWeights(WeightMasks):
    """Masks that a criterion puts on more and more weights (Zhu & Gupta 2017, arXiv:1710.01878).

    The model is scored without the masks, so a masked weight returns if it matters again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pattern: SparsityPattern,
        rescore: Callable[[PreTrainedModel], Mapping[str, Tensor]],
        times: GrowthTimes,
    ) -> None:
        """Makes masks that mask nothing yet.

        Args:
            model: The model.
            pattern: The number of zeros at the end, and their places.
            rescore: Scores each weight, by its name in the state dict; called on every process.
            times: The steps at which the share of zeros grows.
        """
        super().__init__(model, pattern)
        self.rescore, self.times = rescore, times
        self.register_buffer("share", torch.zeros(()))
        self.share: Tensor
        for index, name in enumerate(self.names):
            self.register_buffer(f"mask_{index}", torch.ones_like(model.get_parameter(name), dtype=torch.bool))

    def make_masks(self, model: PreTrainedModel, progress: float) -> Sequence[Tensor]:
        return [self.get_buffer(f"mask_{index}") for index in range(len(self.names))]

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        share = self.times.new_share(step, steps, float(self.share))
        if share is None:
            return
        with in_eval_mode(model):
            scores = self.rescore(model)
        for mask, chosen in zip(
            self.make_masks(model, step / steps), self.mask_lowest(model, scores, share), strict=True
        ):
            mask.copy_(chosen)
        self.share.fill_(share)
