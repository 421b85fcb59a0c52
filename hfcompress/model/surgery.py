"""Cutting heads and neurons out: a new, smaller model whose outputs equal those of the gated one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.base.shape import Layer, Shape, config_of, shape_of
from hfcompress.model.family import Family, family_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Keep:
    """What stays of one layer: head and neuron indices, ascending."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def cut(model: PreTrainedModel, keep: Sequence[Keep]) -> PreTrainedModel:
    """A copy of the model with only the kept heads and neurons; the model itself is left as it was.

    The class is the stock one where a stock config can express the result, else the pruned one of `model/pruned.py`.
    """
    import torch

    shape = shape_of(model.config.to_dict())
    layers = tuple(Layer(len(k.heads), len(k.neurons)) for k in keep)
    small = empty_model(type(model).__name__, replace(shape, layers=layers), model.config)
    weights = dict(model.state_dict())
    family = family_of(model)
    for index, kept in enumerate(keep):
        for name, tensor in _cut_layer(family, family.stack(model)[index], kept, shape.head_dim).items():
            weights[_layer_prefix(model, family, index) + name] = tensor
    with torch.no_grad():
        small.load_state_dict(weights, strict=True)
    return small.train(model.training)


def empty_model(class_name: str, shape: Shape, config: Any) -> PreTrainedModel:
    """A model of `shape` with fresh weights and everything else as in `config`."""
    import transformers

    from hfcompress.model import pruned

    stock = class_name.removeprefix("Pruned")
    cls = getattr(transformers, stock) if shape.stock else getattr(pruned, "Pruned" + stock)
    new_config = cls.config_class.from_dict(config_of(shape, config.to_dict()))
    return cls._from_config(new_config, attn_implementation=config._attn_implementation)


def _layer_prefix(model: nn.Module, family: Family, index: int) -> str:
    base = model.base_model_prefix
    return (f"{base}." if hasattr(model, str(base)) else "") + f"{family.layers}.{index}."


def _cut_layer(family: Family, layer: nn.Module, keep: Keep, head_dim: int) -> dict[str, Tensor]:
    import torch

    rows = torch.tensor([h * head_dim + i for h in keep.heads for i in range(head_dim)], dtype=torch.long)
    neurons = torch.tensor(keep.neurons, dtype=torch.long)
    weights = layer.state_dict()
    return {
        **_rows(weights, family.query, rows),
        **_rows(weights, family.key, rows),
        **_rows(weights, family.value, rows),
        **_columns(weights, family.attention_output, rows),
        **_rows(weights, family.ffn_in, neurons),
        **_columns(weights, family.ffn_out, neurons),
    }


def _rows(weights: dict[str, Tensor], path: str, index: Tensor) -> dict[str, Tensor]:
    names = [name for name in (f"{path}.weight", f"{path}.bias") if name in weights]
    return {name: weights[name][index.to(weights[name].device)] for name in names}


def _columns(weights: dict[str, Tensor], path: str, index: Tensor) -> dict[str, Tensor]:
    weight = weights[f"{path}.weight"]
    return {f"{path}.weight": weight[:, index.to(weight.device)]}
