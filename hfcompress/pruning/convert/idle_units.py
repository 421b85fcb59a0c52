"""Cuts heads and neurons that do nothing, or always give the same: no logit changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import ModulePaths, layers_of, spec_of, unit_counts
from hfcompress.models.surgery import Keep, cut

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel


def cut_idle_units(model: PreTrainedModel) -> tuple[PreTrainedModel, tuple[int, int]]:
    """Cuts heads and neurons whose output is constant; the constant goes into a bias, so the logits stay the same.

    The biases of `model` itself may change.

    Returns:
        The smaller model (or `model` if no unit is idle), and the numbers of head groups and neurons that were cut.
    """
    import torch

    modules, activation = spec_of(model).modules, _activation(model.config)
    keep = []
    with torch.no_grad():
        for layer, groups, neurons in zip(layers_of(model), *unit_counts(model), strict=True):
            keep.append(
                Keep(
                    _select_busy_heads(modules, layer, groups),
                    _select_busy_neurons(modules, layer, neurons, activation),
                )
            )
    heads, neurons = (sum(counts) for counts in unit_counts(model))
    idle = (heads - sum(len(k.heads) for k in keep), neurons - sum(len(k.neurons) for k in keep))
    return (cut(model, keep) if any(idle) else model), idle


def _activation(config: PretrainedConfig) -> Any:
    from transformers.activations import ACT2FN

    keys = ("hidden_act", "hidden_activation", "activation")
    return ACT2FN[next(getattr(config, key) for key in keys if hasattr(config, key))]


def _select_busy_heads(modules: ModulePaths, layer: nn.Module, groups: int) -> tuple[int, ...]:
    """Selects the heads that are not idle.

    A head whose values are constant gives this constant for any attention, because attention weights sum to 1.
    """
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
    return _select_busy(reader, columns, (rows == 0).flatten(1).all(1), given)


def _select_busy_neurons(modules: ModulePaths, layer: nn.Module, neurons: int, activation: Any) -> tuple[int, ...]:
    """Selects the neurons that are not idle.

    A neuron without incoming weights gives the activation of its bias. A gated neuron is idle if it or its gate is 0.
    """
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
    constant = [(row == 0).all(1) for row in rows]
    if len(rows) == 1:
        return _select_busy(reader, columns, constant[0], activation(biases[0])[:, None])
    zero = [c & (bias == 0) for c, bias in zip(constant, biases, strict=True)]
    keeps_zero = bool(activation(torch.zeros(())) == 0)
    idle = torch.stack(zero).any(0) if keeps_zero else torch.zeros_like(zero[0])
    return _select_busy(reader, columns, idle, columns.new_zeros(neurons, 1))


def _select_busy(reader: Any, columns: Tensor, constant: Tensor, given: Tensor) -> tuple[int, ...]:
    """Selects the units that are not idle, and adds the constants of the others to the reader's bias.

    Args:
        reader: The linear layer behind the units.
        columns: Its weights by unit, `(out, units, width)`.
        constant: True for units whose output is constant, `(units,)`.
        given: Their constant outputs, `(units, width)`.
    """
    import torch

    added = torch.einsum("ouw,uw->uo", columns, given)
    unread = (columns == 0).all(2).all(0)
    idle = unread | (constant & ((added == 0).all(1) | (reader.bias is not None)))
    if reader.bias is not None:
        reader.bias += added[idle].sum(0)
    return tuple((~idle).nonzero().flatten().tolist())
