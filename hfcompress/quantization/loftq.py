"""LoftQ: quantized weights and adapters that start as one approximation of the float weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.training.lora import Lora
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def decomposed(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r, `B A`, of what quantizing took from a weight.

    Source: Li et al. 2023, arXiv:2310.08659, eq. 8: `B = U √Σ` and `A = √Σ Vᵀ` of the r largest singular values.

    Args:
        residual: `W - Q`, `(out_features, in_features)`.
        r: The rank.

    Returns:
        `B`, `(out_features, r)`, and `A`, `(r, in_features)`; of a smaller matrix the last columns and rows are zero.
    """
    import torch

    left, values, right = torch.linalg.svd(residual.float(), full_matrices=False)
    roots = values[:r].sqrt()
    b, a = residual.new_zeros(len(residual), r), residual.new_zeros(r, residual.shape[1])
    b[:, : len(roots)] = left[:, :r] * roots
    a[: len(roots)] = roots[:, None] * right[:r]
    return b, a


def to_quantize(weight: Tensor, rounded: Callable[[Tensor], Tensor], r: int, iterations: int) -> Tensor:
    """What is quantized in a weight's place, `W - B A`, so that the adapters have the rest to give.

    Source: Li et al. 2023, arXiv:2310.08659, Algorithm 1: `Q ← q(W - B A)` and `B A ← SVD_r(W - Q)` by turns, from
    `B A = 0`. The quantizing of the last turn is the backend's, and `fit` does its decomposition.

    Args:
        weight: `W`, `(out_features, in_features)`.
        rounded: `q`, quantized and made floats again.
        r: The rank.
        iterations: How many turns.
    """
    left = weight
    for _ in range(iterations - 1):
        b, a = decomposed(weight - rounded(left), r)
        left = weight - b @ a
    return left


def fit(model: PreTrainedModel, weights: Mapping[str, Tensor], options: Lora) -> tuple[float, float]:
    """Sets the adapters of a quantized model to what quantizing took, in place.

    An adapter on a layer that is not quantized starts as it did: there is nothing to give back.

    Args:
        model: With adapters.
        weights: The float weights `(out_features, in_features)` of its adapted layers, by their paths.
        options: The adapters'.

    Returns:
        `‖W - Q‖` and `‖W - Q - B A‖` over all those layers, as shares of `‖W‖`.

    Raises:
        HfcompressError: where none of them is quantized.
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
        b, a = decomposed(residual, options.r)
        root = (options.r / options.alpha) ** 0.5
        layer.lora_B["default"].weight.data.copy_(b * root)
        layer.lora_A["default"].weight.data.copy_(a * root)
        without += float(residual.square().sum())
        with_adapters += float((residual - b @ a).square().sum())
        size += float(weight.square().sum())
    if not size:
        raise HfcompressError(
            "`init: loftq` has nothing to start from: no layer with adapters is quantized",
            "take them out of the backend's `skip`, choose other `targets`, or leave `init` out",
        )
    return (without / size) ** 0.5, (with_adapters / size) ** 0.5
