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
    """Puts torchao's modules into the model from the start to `settle`, around the same weights.

    They round in training mode and in eval mode, so that `lay_over` has nothing to do.
    """

    def __init__(self, model: PreTrainedModel, config: Any, layers: Collection[str]) -> None:
        """Puts the modules into the model.

        Args:
            model: The float model.
            config: What torchao will make of a linear layer; one that it can train for.
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
        """Makes plain linear layers again, with the trained weights; the backend then rounds them in the same way."""
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(step="convert"))
