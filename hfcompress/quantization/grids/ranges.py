"""Scales of the inputs and weights of int8 linear layers, the same in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 255
"""The number of steps of an 8-bit grid."""
LARGEST = 127
"""The largest code of an int8 weight; the grid is symmetric, so -128 is not used."""


@dataclass(frozen=True)
class Ranges:
    """The ranges of linear layers' inputs and the scales of their weights, by the layers' paths in the model.

    Attributes:
        inputs: The lowest and the highest value of a layer's input; values beyond are clipped.
        scales: The scale of each output channel's int8 weights, `(out_features,)`. A layer without an entry has its
            `weight_scales`.
    """

    inputs: Mapping[str, tuple[float, float]]
    scales: Mapping[str, Tensor] = field(default_factory=dict)


def scale_and_zero_point(low: float, high: float) -> tuple[float, int]:
    """Computes scale and zero point of the uint8 grid that covers a range and 0: `x ≈ scale (q - zero_point)`.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3; ONNX Runtime's `compute_scale_zp` gives the same.

    Raises:
        HfcompressError: for a range that is not finite.
    """
    if not math.isfinite(high - low):
        raise HfcompressError("a linear layer reads values that are not finite", "train with a smaller learning rate")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LEVELS or 1.0
    return scale, min(max(round(-low / scale), 0), LEVELS)


def weight_scales(weight: Tensor, per_channel: bool = True, largest: int = LARGEST) -> Tensor:
    """Computes the scale of each output channel's symmetric int8 grid, `max |w| / 127`; 1 for a channel of zeros.

    Args:
        weight: `(out_features, in_features)`.
        per_channel: False to give all output channels the scale of the matrix.
        largest: The largest code.

    Returns:
        `(out_features,)`.
    """
    sizes = weight.detach().abs().amax(-1)
    scales = (sizes if per_channel else sizes.amax().expand_as(sizes)) / largest
    return scales.where(scales > 0, scales.new_ones(()))
