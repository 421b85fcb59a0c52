"""Quantization-aware training as torchao does it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from hfcompress.quantization.qat.fake_quantization import FakeQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchaoTraining(FakeQuantization):
    """torchao's modules stand in the model from the start to `settle`, around the weights that were there.

    They round in training and in eval mode alike, so that nothing lies over the model step by step.
    """

    def __init__(self, model: PreTrainedModel, config: Any, layers: Collection[str]) -> None:
        """Prepares the model.

        Args:
            model: The float model.
            config: What torchao is to make of a linear layer in the end; one that it can train for.
            layers: Paths of the linear layers.
        """
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        super().__init__(nn.Identity())
        quantize_(model, QATConfig(config, step="prepare"), filter_fn=lambda _, path: path in layers)

    @contextmanager
    def applied(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        yield

    def settle(self, model: PreTrainedModel) -> None:
        """The layers are plain ones again, with the trained weights: what rounds them alike is the backend."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"))
