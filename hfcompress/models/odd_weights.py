"""Finds weights that an 8-bit grid stores badly, to warn the user before the answers get worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor, nn

LOST = 0.5
"""Share of an output channel's weights that round to 0 from which on it is odd; of normal ones 1% do at 8 bits."""


ODD = {"zeros": "are all zeros", "outlier": "mostly round to zero, beside an outlier"}
"""How messages describe the oddities of an output channel."""


def odd_weights(layers: Mapping[str, nn.Linear], rounded: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """Finds output channels of linear layers that an 8-bit grid stores badly.

    `zeros` are output channels without any weight; they stay as they are. An `outlier` is an output channel in which
    more than half of the weights round to 0, since a few are so much larger that the steps of the grid are theirs.

    Args:
        layers: By path.
        rounded: From a layer's weights `(out_features, in_features)` to what is stored of them, made floats again.

    Returns:
        For each layer and each thing that is odd about it `layer`, `what` and how many `channels`.

    Raises:
        HfcompressError: for a layer with weights that are not finite, or not once they are stored.
    """
    require_finite(layers)
    found = []
    for path, layer in layers.items():
        weight = layer.weight.detach()
        filled = weight != 0
        stored = rounded(weight)
        if not stored.isfinite().all():
            message = f"{path} has a weight of {float(weight.abs().max()):.3g}, which cannot be stored so"
            raise HfcompressError(message, "use onnx_int8 or torch_int8, or train the model again")
        lost = ((stored == 0) & filled).sum(-1) > LOST * filled.sum(-1)
        for what, channels in (("zeros", ~filled.any(-1)), ("outlier", lost)):
            if channels.any():
                found.append({"layer": path, "what": what, "channels": int(channels.sum())})
    return found


def require_finite(layers: Mapping[str, nn.Linear]) -> None:
    """Requires finite weights in linear layers.

    Args:
        layers: By path.

    Raises:
        HfcompressError: for a layer in which they are not.
    """
    for path, layer in layers.items():
        broken = int((~layer.weight.isfinite()).any(-1).sum())
        if broken or not (layer.bias is None or layer.bias.isfinite().all()):
            raise HfcompressError(
                f"{path} has weights that are NaN or infinite"
                + (f", in {broken} of its {len(layer.weight)} output channels" if broken else ", in its bias"),
                "train the model again, or start from an earlier checkpoint: no grid has room for them",
            )
