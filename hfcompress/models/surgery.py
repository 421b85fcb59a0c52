"""Cuts heads and neurons out of a model: the smaller model gives the same outputs as the gated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import ModulePaths, layers_of, spec_of, unit_counts
from hfcompress.models.shape import Layer, Shape, config_of, shape_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

BIAS_TABLE = "relative_attention_bias.weight"
"""The end of the weight name of MPNet's table of relative positions, `(buckets, heads)`."""


@dataclass(frozen=True)
class Keep:
    """The head groups and neurons of one layer that stay, as ascending indices."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def cut(model: PreTrainedModel, keep: Sequence[Keep]) -> PreTrainedModel:
    """Copies a model with only the kept heads and neurons; the model itself is not changed.

    The copy has the stock class if a stock config can express its shape, else the class of `models/modeling_pruned.py`.

    Args:
        model: A model of one of `ARCHITECTURES`.
        keep: One for each layer; a single one if all layers share their weights (ALBERT).
    """
    import torch

    shape, modules = shape_of(model.config.to_dict()), spec_of(model).modules
    stack = layers_of(model)
    weights = dict(model.state_dict())
    for index, (layer, kept, units) in enumerate(zip(stack, keep, zip(*unit_counts(model), strict=True), strict=True)):
        for name, tensor in _cut_layer(modules, layer, kept, *units).items():
            weights[_layer_prefix(model, modules, index) + name] = tensor
    small_shape = _cut_shape(shape, keep)
    if small_shape.bias_heads != shape.bias_heads:
        name = next(name for name in weights if name.endswith(BIAS_TABLE))
        weights[name] = weights[name][:, list(_columns_read(shape.layers[0], keep[0]))]
    small = empty_model(type(model).__name__, small_shape, model.config)
    with torch.no_grad():
        small.load_state_dict(weights, strict=True)
    return small.train(model.training)


def _cut_shape(shape: Shape, keep: Sequence[Keep]) -> Shape:
    """Computes the shape after the cut.

    MPNet's table of relative positions loses columns only if all layers read the same ones.
    """
    keep = list(keep) * (len(shape.layers) if shape.spec.shared_layers else 1)
    layers = [Layer(len(k.heads) * shape.group, len(k.neurons)) for k in keep]
    if not shape.bias_heads:
        return replace(shape, layers=tuple(layers))
    read = [_columns_read(layer, k) for layer, k in zip(shape.layers, keep, strict=True)]
    if len(set(read)) == 1 and read[0]:
        return replace(shape, layers=tuple(layers), bias_heads=len(read[0]))
    told = tuple(replace(layer, bias_columns=columns) for layer, columns in zip(layers, read, strict=True))
    return replace(shape, layers=told)


def _columns_read(layer: Layer, keep: Keep) -> tuple[int, ...]:
    columns = layer.bias_columns or range(layer.heads)
    return tuple(columns[head] for head in keep.heads)


def empty_model(class_name: str, shape: Shape, config: Any) -> PreTrainedModel:
    """Makes a model of a shape with random weights; everything else is as in `config`."""
    import transformers

    from hfcompress.models import modeling_pruned as pruned

    stock = class_name.removeprefix("Pruned")
    cls = getattr(transformers, stock) if shape.stock else getattr(pruned, "Pruned" + stock)
    new_config = cls.config_class.from_dict(config_of(shape, config.to_dict()))
    return cls._from_config(new_config, attn_implementation=config._attn_implementation)


def _layer_prefix(model: nn.Module, modules: ModulePaths, index: int) -> str:
    base = model.base_model_prefix
    return (f"{base}." if hasattr(model, str(base)) else "") + f"{modules.layers}.{index}."


def _cut_layer(modules: ModulePaths, layer: nn.Module, keep: Keep, heads: int, neurons: int) -> dict[str, Tensor]:
    """Cuts the weights of a layer to `keep` of its `heads` groups and `neurons`; weights that stay are left out."""
    weights, smaller = layer.state_dict(), {}
    for units, kept, rows, columns in (
        (heads, keep.heads, modules.head_rows, modules.attention_output),
        (neurons, keep.neurons, modules.neuron_rows, modules.ffn_out),
    ):
        for path, parts in rows.items():
            for name in (f"{path}.weight", f"{path}.bias"):
                if name in weights:
                    smaller[name] = _units(weights[name], 0, parts, units, kept)
        smaller[f"{columns}.weight"] = _units(weights[f"{columns}.weight"], 1, 1, units, kept)
    return smaller


def _units(weight: Tensor, axis: int, parts: int, units: int, kept: Sequence[int]) -> Tensor:
    """Selects units along an axis, on which `parts` parts lie side by side, each with `units` units in order."""
    if not units:
        return weight
    import torch

    index = torch.tensor(kept, dtype=torch.long, device=weight.device)
    return weight.unflatten(axis, (parts, units, -1)).index_select(axis + 1, index).flatten(axis, axis + 2)
