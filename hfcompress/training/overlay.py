"""The training overlay: masks or fake quantization that change what a model computes while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor, nn

from hfcompress.models.surgery import Keep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


STEADY = "steady"
"""The key of an optimizer group whose learning rate stays constant, whatever the schedule is."""


class TrainingOverlay(nn.Module):
    """Changes what a model computes while it trains. The base class does nothing; each kind overrides what it needs.

    It is part of the training objective: its parameters and buffers are trained, averaged over processes and saved in
    checkpoints with those of the model. Every process makes the same overlay.

    In training mode it changes the model as its method defines. In eval mode it changes the model as if the training
    ended at this step, under the budget of this step.

    Attributes:
        seed: The seed of all samples, together with the step; set by the training.
    """

    closing: ClassVar[bool] = True
    """True if the overlay changes the model step by step: an early model can then not be the best one."""
    seed: int = 0

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        """Lays the overlay over the model's forward passes while the context lasts.

        Args:
            model: The model.
            progress: The share of the steps that are done, in [0, 1].
        """
        yield

    def penalty(self, progress: float) -> Tensor | None:
        """Computes a penalty that is added to the loss of a step; called inside `lay_over`. None adds nothing."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Makes optimizer groups for parameters of the overlay; the others are trained like the model's."""
        return []

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Updates the overlay after optimizer step `step` (from 1) of `steps`, and corrects weights if needed."""

    def settle(self, model: PreTrainedModel) -> None:
        """Moves the effect of the overlay into the weights, once, after the training.

        The model, cut to `keep` if the masks are on units, then computes the same as under the overlay.
        """

    def keep(self) -> list[Keep]:
        """Lists the heads and neurons of each layer that stay after the training; for masks on units."""
        raise NotImplementedError

    def noise(self, count: int, progress: float) -> Tensor:
        """Draws `(count,)` uniform numbers from [0, 1): the same on all processes and in all batches of a step.

        If each process drew its own, the averaged gradient would belong to no single mask.
        """
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {progress}".encode()))
        return torch.rand(count, generator=generator)


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model in eval mode, without dropout, while the context lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
