"""Finds the linear modules of a model, which are pruned weight by weight, and quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hfcompress.models.architectures import ARCHITECTURES, layers_of
from hfcompress.models.shape import Layer, Shape

if TYPE_CHECKING:
    from torch import nn


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Finds all linear modules by their paths in `model`, also those of pooler and task head; a shared one once."""
    from torch import nn

    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Finds the linear modules of the transformer layers, in attention and FFN, by their paths in `model`."""
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    return {path: module for path, module in linears(model).items() if id(module) in inside}


def planned_linears(shape: Shape, layer: Layer) -> Iterator[tuple[str, int, int]]:
    """Yields path, inputs and outputs of each linear module that a transformer layer of a shape will have."""
    modules, heads = ARCHITECTURES[shape.architecture].modules, layer.heads * shape.head_dim
    rows = {modules.query: heads, modules.key: heads // shape.group, modules.value: heads // shape.group}
    rows = {path: rows[path] * parts for path, parts in modules.head_rows.items()}
    rows |= {path: layer.ffn * parts for path, parts in modules.neuron_rows.items()}
    found = [(path, shape.hidden, outputs) for path, outputs in rows.items()]
    found += [(modules.attention_output, heads, shape.hidden), (modules.ffn_out, layer.ffn, shape.hidden)]
    yield from (linear for linear in found if linear[1] and linear[2])
