"""LoftQ: starts the adapters of a quantized model at the best fit of the quantization error of its weights.

Source: Li et al. 2023, arXiv:2310.08659. peft's `replace_lora_weights_loftq` was tried and not chosen: it makes one
turn of Algorithm 1, for 4-bit layers only, on a GPU, and it ignores the adapters' scale `alpha / r`. This code makes
any number of turns, with the backend's own rounding, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.quantization.facts import LoftqError
from hfcompress.training.lora import Lora
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def approximate(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Finds the best approximation `B A` of rank r of the quantization error of a weight.

    Eq. 8: `B = U √Σ` and `A = √Σ Vᵀ` of the r largest singular values.

    Args:
        residual: `W - Q`, `(out_features, in_features)`.
        r: The rank.

    Returns:
        `B`, `(out_features, r)`, and `A`, `(r, in_features)`; filled up with zeros if the matrix has a lower rank.
    """
    import torch

    left, values, right = torch.linalg.svd(residual.float(), full_matrices=False)
    roots = values[:r].sqrt()
    b, a = residual.new_zeros(len(residual), r), residual.new_zeros(r, residual.shape[1])
    b[:, : len(roots)] = left[:, :r] * roots
    a[: len(roots)] = roots[:, None] * right[:r]
    return b, a


def alternate(weight: Tensor, fake_quantize: Callable[[Tensor], Tensor], r: int, iterations: int) -> Tensor:
    """Computes the weight `W - B A` to quantize in place of W, so that the adapters can add the rest.

    Algorithm 1: `Q ← q(W - B A)` and `B A ← SVD_r(W - Q)` in turns, from `B A = 0`. The backend quantizes in the last
    turn, and `start_adapters` makes its decomposition.

    Args:
        weight: `W`, `(out_features, in_features)`.
        fake_quantize: `q`, quantizes and dequantizes.
        r: The rank.
        iterations: The number of turns.
    """
    left = weight
    for _ in range(iterations - 1):
        b, a = approximate(weight - fake_quantize(left), r)
        left = weight - b @ a
    return left


def start_adapters(model: PreTrainedModel, weights: Mapping[str, Tensor], options: Lora) -> LoftqError:
    """Sets the adapters of a quantized model, in place, to the best fit of the quantization error of its weights.

    An adapter on a layer that is not quantized stays as it is: there is no error.

    Args:
        model: A quantized model with adapters.
        weights: The float weights `(out_features, in_features)` of its adapted layers, by path.
        options: The options of the adapters.

    Returns:
        The error of all adapted layers that are quantized.

    Raises:
        HfcompressError: if none of them is quantized.
    """
    from peft.utils.integrations import dequantize_module_weight

    without = with_adapters = size = 0.0
    for name, weight in weights.items():
        layer: Any = model.get_submodule(name)
        base = layer.get_base_layer()
        if base.weight.is_floating_point():
            continue
        weight = weight.detach()
        residual = weight - dequantize_module_weight(base).to(weight)
        b, a = approximate(residual, options.r)
        root = (options.r / options.alpha) ** 0.5
        layer.lora_B["default"].weight.data.copy_(b * root)
        layer.lora_A["default"].weight.data.copy_(a * root)
        without += float(residual.square().sum())
        with_adapters += float((residual - b @ a).square().sum())
        size += float(weight.square().sum())
    if not size:
        raise HfcompressError(
            "`init: loftq` has no error to start from: none of the layers with adapters is quantized",
            "take them out of the backend's `skip`, choose other `targets`, or leave `init` out",
        )
    return LoftqError((without / size) ** 0.5, (with_adapters / size) ** 0.5)
