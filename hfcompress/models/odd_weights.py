"""Finds weights that a quantization grid stores badly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor, nn

LOST = 0.5
"""An output channel is odd if a larger share of its weights rounds to 0; normally 1% do at 8 bits."""
DESCRIPTIONS = {"zeros": "are all zeros", "outlier": "mostly round to zero, because one weight is much larger"}


@dataclass(frozen=True)
class OddWeights:
    """Output channels of one linear layer that a grid stores badly.

    Attributes:
        layer: The layer's path.
        what: `zeros` for channels whose weights are all 0, which stay so. `outlier` for channels in which more than
            half of the weights round to 0, because a few much larger ones decide the size of a step.
        channels: Their number.
    """

    layer: str
    what: Literal["zeros", "outlier"]
    channels: int

    @property
    def description(self) -> str:
        """The end of a sentence about output channels."""
        return DESCRIPTIONS[self.what]


def find_odd_weights(layers: Mapping[str, nn.Linear], fake_quantize: Callable[[Tensor], Tensor]) -> list[OddWeights]:
    """Finds output channels that a grid stores badly.

    Args:
        layers: The layers by path.
        fake_quantize: Quantizes and dequantizes a layer's weights `(out_features, in_features)`.

    Returns:
        At most two entries for each layer: one for zeros, one for outliers.

    Raises:
        HfcompressError: for a layer with weights that are not finite, before or after quantization.
    """
    require_finite(layers)
    found = list[OddWeights]()
    for path, layer in layers.items():
        weight = layer.weight.detach()
        filled = weight != 0
        stored = fake_quantize(weight)
        if not stored.isfinite().all():
            message = f"{path} has a weight of {float(weight.abs().max()):.3g}, which is too large to be stored"
            raise HfcompressError(message, "use onnx_int8 or torch_int8, or train the model again")
        zeros = int((~filled.any(-1)).sum())
        outliers = int((((stored == 0) & filled).sum(-1) > LOST * filled.sum(-1)).sum())
        found += [OddWeights(path, "zeros", zeros)] if zeros else []
        found += [OddWeights(path, "outlier", outliers)] if outliers else []
    return found


def require_finite(layers: Mapping[str, nn.Linear]) -> None:
    """Checks that all weights of linear layers are finite.

    Args:
        layers: The layers by path.

    Raises:
        HfcompressError: for the first layer with others.
    """
    for path, layer in layers.items():
        broken = int((~layer.weight.isfinite()).any(-1).sum())
        if broken or not (layer.bias is None or layer.bias.isfinite().all()):
            raise HfcompressError(
                f"{path} has weights that are NaN or infinite"
                + (f", in {broken} of its {len(layer.weight)} output channels" if broken else ", in its bias"),
                "train the model again, or start from an earlier checkpoint: such weights cannot be quantized",
            )
