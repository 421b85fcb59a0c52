"""Gates on attention heads and FFN neurons; they replace `head_mask` and work with every attention implementation.

A gate multiplies the output of a head or neuron before the next linear layer. It is the ξ of Michel et al. 2019
(arXiv:1905.10650, eq. 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import layers_of, spec_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def apply_gates(model: nn.Module, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> Iterator[None]:
    """Multiplies the output of every head and neuron by its gate inside the context.

    Args:
        model: A Hugging Face model.
        heads: One tensor for each layer's weights, `(head groups,)` or `(batch, head groups)`.
        neurons: One tensor for each layer's weights, `(ffn,)` or `(batch, ffn)`.
    """
    modules = spec_of(model).modules
    handles = []
    try:
        for layer, head_gate, neuron_gate in zip(layers_of(model), heads, neurons, strict=True):
            for path, gate in ((modules.attention_output, head_gate), (modules.ffn_out, neuron_gate)):
                handles.append(layer.get_submodule(path).register_forward_pre_hook(partial(_multiply, gate)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply(gate: Tensor, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = inputs[0]
    units = gate.shape[-1]
    if units == 0:
        return inputs
    gate = gate.reshape(-1, 1, units, 1)
    return ((x.unflatten(-1, (units, -1)) * gate).flatten(-2), *inputs[1:])


def fold_gates(model: nn.Module, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> None:
    """Multiplies each unit's columns of the next linear layer by its gate, in place.

    Args:
        model: A Hugging Face model.
        heads, neurons: One tensor for each layer's weights, `(head groups,)` and `(ffn,)`.
    """
    import torch

    modules = spec_of(model).modules
    with torch.no_grad():
        for layer, head_gate, neuron_gate in zip(layers_of(model), heads, neurons, strict=True):
            for path, gate in ((modules.attention_output, head_gate), (modules.ffn_out, neuron_gate)):
                weight = layer.get_parameter(f"{path}.weight")
                if len(gate):
                    weight.mul_(gate.to(weight).repeat_interleave(weight.shape[1] // len(gate)))
