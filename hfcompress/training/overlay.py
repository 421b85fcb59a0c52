"""The training overlay: what lies over a model while it trains, such as masks or fake quantization."""

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
"""The key of an optimizer group that is true if its learning rate stays constant, whatever the schedule is."""


class TrainingOverlay(nn.Module):
    """Changes what a model computes while it trains. The base class does nothing; each kind overrides what it needs.

    It is a part of the training objective: its parameters and buffers are trained, averaged over processes and saved in
    checkpoints with those of the model. Every process makes the same overlay.

    In training mode it changes the model as its method says. In eval mode it changes the model as if the training ended
    at this step: to what `keep` returns, under the budget of this step.

    Attributes:
        seed: Decides, together with the step, what is sampled; set by the training.
    """

    closing: ClassVar[bool] = True
    """True if the overlay changes the model step by step: an early model then is no candidate for the best one."""
    seed: int = 0

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        """Lays the overlay over the model's forward passes inside the context.

        Args:
            model: The model.
            progress: Share of the steps that are done, in [0, 1].
        """
        yield

    def penalty(self, progress: float) -> Tensor | None:
        """Computes what is added to the loss of a step; called inside of `lay_over`."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Makes optimizer groups for the overlay's parameters; those in no group are trained like the model's."""
        return []

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Called after optimizer step `step` (from 1) of `steps`: restores what must hold for the weights."""

    def settle(self, model: PreTrainedModel) -> None:
        """Called once, after the training: moves the effect of the overlay on what stays into the weights.

        Afterwards the model, cut to `keep` if the masks are on units, computes the same as under the overlay.
        """

    def keep(self) -> list[Keep]:
        """Lists the heads and neurons that stay after the training; for masks on units."""
        raise NotImplementedError

    def noise(self, count: int, progress: float) -> Tensor:
        """Draws `(count,)` uniform numbers from [0, 1): equal on all processes, in all batches of a step, and resumed.

        If each process drew its own, the averaged gradient would belong to no mask that was ever applied.
        """
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {progress}".encode()))
        return torch.rand(count, generator=generator)


@contextmanager
def in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model in eval mode inside the context: dropout is off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
