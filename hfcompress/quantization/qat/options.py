"""The `train:` block of a quantize stage: quantization-aware training, or adapters on a quantized model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hfcompress.distillation.recovery import Recover
from hfcompress.utils.errors import Problem


class QatTraining(Recover):
    """A `train:` block with losses and a teacher; the default teacher is the stage's float model."""

    ranges: Literal["ema", "learned"] = "ema"
    """The method for the ranges of int8 activations in training: `ema` follows the batches by a moving average (Jacob
    et al. 2018), `learned` trains the step sizes of activations and weights (LSQ)."""
    freeze: float = Field(default=0.5, gt=0, le=1)
    """The share of the steps after which the ranges no longer change, so that the weights can adapt to them."""

    def _adapter_problems(self) -> list[Problem]:
        return []  # the weights under the adapters are quantized
