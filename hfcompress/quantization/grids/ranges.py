"""The grid that a linear layer's int8 inputs and weights lie on, the same in torch and in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 255
"""Steps of an 8-bit grid."""
LARGEST = 127
"""The largest int8 weight: the grid is symmetric, so -128 is not used."""


@dataclass(frozen=True)
class Ranges:
    """What the linear layers of a model read, and the steps of their weights, by the layers' paths in the model.

    Attributes:
        inputs: The lowest and the highest value that a layer's input may have; what is beyond is clipped.
        steps: The size of one int8 step of each output channel's weights, `(out_features,)`; of a layer that is not
            named it is `weight_steps`.
    """

    inputs: Mapping[str, tuple[float, float]]
    steps: Mapping[str, Tensor] = field(default_factory=dict)


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the uint8 grid that covers a range and has 0 on it: `x ≈ scale (q - zero_point)`.

    Raises:
        HfcompressError: for a range that is not finite.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3; ONNX Runtime's `compute_scale_zp` gives the same.
    """
    if not math.isfinite(high - low):
        raise HfcompressError("a linear layer reads values that are not finite", "train with a smaller learning rate")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    return scale, min(max(round(-low / scale), 0), LEVELS)


def weight_steps(weight: Tensor, per_channel: bool = True, largest: int = LARGEST) -> Tensor:
    """The step of each output channel's symmetric int8 grid, `max |w| / 127`; 1 for a channel of zeros.

    Args:
        weight: `(out_features, in_features)`.
        per_channel: Each output channel has its own step; else all have that of the matrix.
        largest: The largest whole number of steps.

    Returns:
        `(out_features,)`.
    """
    sizes = weight.detach().abs().amax(-1)
    steps = (sizes if per_channel else sizes.amax().expand_as(sizes)) / largest
    return steps.where(steps > 0, steps.new_ones(()))
