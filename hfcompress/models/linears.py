"""The linear modules of a model: what is pruned weight by weight, and what is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hfcompress.models.architectures import FAMILIES, family_of
from hfcompress.models.shape import Layer, Shape

if TYPE_CHECKING:
    from torch import nn


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear modules, those of pooler and head too, by their paths in `model`; shared ones once."""
    from torch import nn

    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the transformer layers: of the attention and of the FFN."""
    inside = {id(module) for layer in family_of(model).stack(model) for module in layer.modules()}
    return {path: module for path, module in linears(model).items() if id(module) in inside}


def planned_linears(shape: Shape, layer: Layer) -> Iterator[tuple[str, int, int]]:
    """The linear layers that a transformer layer will have: path, inputs, outputs; empty ones are left out."""
    family, heads = FAMILIES[shape.architecture], layer.heads * shape.head_dim
    rows = {family.query: heads, family.key: heads // shape.group, family.value: heads // shape.group}
    rows = {path: rows[path] * parts for path, parts in family.head_rows.items()}
    rows |= {path: layer.ffn * parts for path, parts in family.neuron_rows.items()}
    found = [(path, shape.hidden, outputs) for path, outputs in rows.items()]
    found += [(family.attention_output, heads, shape.hidden), (family.ffn_out, layer.ffn, shape.hidden)]
    yield from (linear for linear in found if linear[1] and linear[2])
