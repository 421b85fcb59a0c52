"""Quantization-aware training by torchao."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from hfcompress.quantization.qat.fake_quantization import FakeQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchaoTraining(FakeQuantization):
    """Puts torchao's modules into the model until `settle`, around the same weights.

    They round in training mode and in eval mode, so `lay_over` does nothing.
    """

    def __init__(self, model: PreTrainedModel, config: Any, layers: Collection[str]) -> None:
        """Puts the modules into the model.

        Args:
            model: The float model.
            config: torchao's configuration for linear layers, of a kind that torchao can train for.
            layers: Paths of the linear layers.
        """
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        super().__init__(nn.Identity())
        quantize_(model, QATConfig(config, step="prepare"), filter_fn=lambda _, path: path in layers)

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        yield

    def settle(self, model: PreTrainedModel) -> None:
        """Restores plain linear layers with the trained weights; the backend then rounds them in the same way."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"))
