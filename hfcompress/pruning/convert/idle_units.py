"""Heads and neurons that do nothing, or always the same: they can go, and no logit moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import ModulePaths, layers_of, spec_of, unit_counts
from hfcompress.models.surgery import Keep, cut

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


def without_idle_units(model: PreTrainedModel) -> tuple[PreTrainedModel, tuple[int, int]]:
    """The model without heads and neurons that give nothing, or always the same, which then goes into a bias.

    Its logits stay as they were; the biases of `model` itself may not.

    Returns:
        The smaller model (or `model`, where all do something), and how many heads and neurons are gone.
    """
    import torch

    modules, activation = spec_of(model).modules, _activation(model.config)
    keep = []
    with torch.no_grad():
        for layer, groups, neurons in zip(layers_of(model), *unit_counts(model), strict=True):
            keep.append(Keep(_busy_heads(modules, layer, groups), _busy_neurons(modules, layer, neurons, activation)))
    heads, neurons = (sum(counts) for counts in unit_counts(model))
    idle = (heads - sum(len(k.heads) for k in keep), neurons - sum(len(k.neurons) for k in keep))
    return (cut(model, keep) if any(idle) else model), idle


def _activation(config: PretrainedConfig) -> Any:
    from transformers.activations import ACT2FN

    keys = ("hidden_act", "hidden_activation", "activation")
    return ACT2FN[next(getattr(config, key) for key in keys if hasattr(config, key))]


def _busy_heads(modules: ModulePaths, layer: nn.Module, groups: int) -> tuple[int, ...]:
    """A head whose values are all the same gives them whatever it attends to, since attention sums to 1."""
    if not groups:
        return ()
    value: Any = layer.get_submodule(modules.value)
    reader: Any = layer.get_submodule(modules.attention_output)
    parts = modules.head_rows[modules.value]
    rows = value.weight.unflatten(0, (parts, groups, -1))[-1]
    columns = reader.weight.unflatten(1, (groups, -1))
    given = columns.new_zeros(columns.shape[1:])
    if value.bias is not None:
        biases = value.bias.unflatten(0, (parts, groups, -1))[-1]
        given = biases.repeat(1, columns.shape[2] // biases.shape[1])
    return _busy(reader, columns, (rows == 0).flatten(1).all(1), given)


def _busy_neurons(modules: ModulePaths, layer: nn.Module, neurons: int, activation: Any) -> tuple[int, ...]:
    """A neuron without incoming weights gives its activated bias; a gated one is idle if it or its gate is."""
    import torch

    if not neurons:
        return ()
    reader: Any = layer.get_submodule(modules.ffn_out)
    rows: list[Tensor] = []
    biases: list[Tensor] = []
    columns = reader.weight.unflatten(1, (neurons, -1))
    for path, parts in modules.neuron_rows.items():
        made: Any = layer.get_submodule(path)
        rows += made.weight.unflatten(0, (parts, neurons)).unbind(0)
        biases += made.weight.new_zeros(parts, neurons) if made.bias is None else made.bias.unflatten(0, (parts, -1))
    still = [(row == 0).all(1) for row in rows]
    if len(rows) == 1:
        return _busy(reader, columns, still[0], activation(biases[0])[:, None])
    nothing = [s & (bias == 0) for s, bias in zip(still, biases, strict=True)]
    passes_zero = bool(activation(torch.zeros(())) == 0)
    idle = torch.stack(nothing).any(0) if passes_zero else torch.zeros_like(nothing[0])
    return _busy(reader, columns, idle, columns.new_zeros(neurons, 1))


def _busy(reader: Any, columns: Tensor, still: Tensor, given: Tensor) -> tuple[int, ...]:
    """The units that do something; what the others always give goes into the reader's bias.

    Args:
        reader: The linear layer behind the units.
        columns: Its weights by unit, `(out, units, width)`.
        still: The units that always give the same, `(units,)`.
        given: What they give, `(units, width)`.
    """
    import torch

    constant = torch.einsum("ouw,uw->uo", columns, given)
    unread = (columns == 0).all(2).all(0)
    idle = unread | (still & ((constant == 0).all(1) | (reader.bias is not None)))
    if reader.bias is not None:
        reader.bias += constant[idle].sum(0)
    return tuple((~idle).nonzero().flatten().tolist())
