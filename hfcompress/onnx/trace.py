"""Traces each linear layer and each attention of a model as one node; `fuse` turns these nodes into ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from hfcompress.models.architectures import spec_of
from hfcompress.onnx.fuse import DOMAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_linear, _attention = functional.linear, functional.scaled_dot_product_attention


@contextmanager
def keep_layers_whole(model: PreTrainedModel) -> Iterator[None]:
    """Makes a trace of the model have `Linear` and `Attention` nodes while the context lasts.

    It replaces two functions of torch instead of modules: all architectures in all releases of transformers call these
    two. A model that computes attention in another way (DeBERTa, MPNet) keeps its own operators.
    """
    paths = {id(module.weight): path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    masks = _Masks(_reads_all(model))

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in paths:
            return _linear(inputs, weight, bias)
        return _Linear.apply(inputs, weight, bias, paths[id(weight)], inputs.dim())

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
        heads, width = int(query.shape[1]), int(value.shape[-1])
        return _Attention.apply(query, key, value, masks.make_additive(attn_mask), heads, width, is_causal, scale)

    implementation = model.config._attn_implementation
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    hook = model.register_forward_pre_hook(masks.enter, with_kwargs=True)
    try:
        with (
            patch.object(functional, "linear", linear),
            patch.object(functional, "scaled_dot_product_attention", attention),
        ):
            yield
    finally:
        hook.remove()
        model.set_attn_implementation(implementation)


def _reads_all(model: PreTrainedModel) -> bool:
    """True if in each layer each token reads all tokens except padding."""
    return spec_of(model).plain_attention and not getattr(model.config, "is_decoder", False)


class _Masks:
    """The additive attention masks; each is made once for all layers that share it.

    If each token reads all others, the mask is made directly from the model's `attention_mask`: transformers' own code
    for it differs by release, and has dozens of operators.
    """

    def __init__(self, from_input: bool) -> None:
        self.from_input = from_input
        self.given: Tensor | None = None
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def enter(self, _model: Any, _inputs: Any, kwargs: dict[str, Any]) -> None:
        self.given = kwargs.get("attention_mask")

    def make_additive(self, mask: Tensor | None) -> Tensor | None:
        """Makes a mask to add to attention scores, `(batch or 1, heads or 1, length, length)`."""
        if self.from_input:
            mask = self.given
        if mask is None:
            return None
        if id(mask) not in self.made:  # the mask stays referenced, so that no other object gets its id
            self.made[id(mask)] = mask, _to_additive(mask)
        return self.made[id(mask)][1]


def _to_additive(mask: Tensor) -> Tensor:
    if mask.dim() == 2:
        mask = mask[:, None, None].bool()
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return mask.expand(-1, -1, mask.shape[-1], -1) if mask.shape[-2] == 1 else mask


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, path: str, rank: int) -> Tensor:
        return _linear(inputs, weight, bias)

    @staticmethod
    def symbolic(g: Any, inputs: Any, weight: Any, bias: Any, path: str, rank: int) -> Any:
        given = (inputs, weight) if bias is None else (inputs, weight, bias)
        made = g.op(f"{DOMAIN}::Linear", *given, path_s=path, rank_i=rank)
        return made.setType(weight.type().with_sizes([*[None] * (rank - 1), weight.type().sizes()[0]]))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, heads: int, width: int, causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        return _attention(query, key, value, bias, is_causal=causal, scale=scale)

    @staticmethod
    def symbolic(
        g: Any, query: Any, key: Any, value: Any, bias: Any, heads: int, width: int, causal: bool, scale: float
    ) -> Any:
        given = (query, key, value) if bias is None else (query, key, value, bias)
        told = {"num_heads_i": heads, "width_i": width, "unidirectional_i": int(causal), "scale_f": scale}
        made = g.op(f"{DOMAIN}::Attention", *given, **told)
        # The nodes after this one need the number of axes.
        return made.setType(query.type().with_dtype(torch.float32).with_sizes([None, heads, None, width]))
