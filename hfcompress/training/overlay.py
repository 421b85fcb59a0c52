"""What lies over a model while it trains: masks and fake quantization."""

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
"""True in an optimizer group whose learning rate stays as it is, whatever the schedule of the model's."""


class TrainingOverlay(nn.Module):
    """The base does nothing; a kind of mask overrides what it needs.

    It is a part of the training objective: its parameters are trained, averaged over processes, and kept in
    checkpoints as the model's are, and so are its buffers. Every process makes the same masks.

    In training mode a mask lies over the model as its method says. In eval mode it is what the masks would come to if
    the training ended there: what `keep` tells, under the budget of that step.

    Attributes:
        seed: Decides what is sampled, together with the step; set by the training.
    """

    closing: ClassVar[bool] = True
    """Whether what the model gives changes with the step, so that an early model is not one of those to come."""
    seed: int = 0

    @contextmanager
    def applied(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        """The mask lies over the model's forward passes while the context lasts.

        Args:
            model: The model.
            progress: Share of the steps that are done, in [0, 1].
        """
        yield

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss of a step; called inside of `applied`."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the masks' own parameters; those named in none are trained as the model's are."""
        return []

    def stepped(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """After optimizer step `step` (from 1) of `steps`: what must hold in the weights is made to hold."""

    def settle(self, model: PreTrainedModel) -> None:
        """Once, when the training is done: what the masks do to the values of what stays goes into the weights.

        After it a model cut to `keep`, or as it stands where the masks are on weights, gives what the masked one gave.
        """

    def keep(self) -> list[Keep]:
        """The heads and neurons that stay, once the training is done; of masks on units."""
        raise NotImplementedError

    def noise(self, count: int, progress: float) -> Tensor:
        """`(count,)` uniform draws from [0, 1): the same on all processes, in all batches of a step, and when resumed.

        Each process drawing its own would train masks that no gradient was ever taken at.
        """
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {progress}".encode()))
        return torch.rand(count, generator=generator)


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout is off while the context lasts."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
