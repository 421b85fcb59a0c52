"""What lies over a model while it trains: zeros that stay zero, gates that close, masks that are learned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.model.surgery import Keep


class Masks(nn.Module):
    """The base does nothing; a kind of mask overrides what it needs.

    It is a part of the training objective: its parameters are trained, averaged over processes, and kept in
    checkpoints as the model's are, and so are its buffers.
    """

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
        """Optimizer groups of the masks' own parameters; those named in none get the model's learning rate."""
        return []

    def stepped(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """After optimizer step `step` (from 1) of `steps`: what must hold in the weights is made to hold."""

    def keep(self) -> list[Keep]:
        """The heads and neurons that stay, once the training is done; of masks on units."""
        raise NotImplementedError
