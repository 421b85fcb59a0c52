"""Observes a forward pass: logits, hidden states, and the queries, keys and values inside the attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import head_dim_of, layers_of, spec_of

if TYPE_CHECKING:
    from torch import Tensor, nn

PROJECTIONS = ("queries", "keys", "values")


@dataclass(frozen=True)
class Observation:
    """The outputs of one forward pass, and the tensors inside it.

    Attributes:
        logits: `(batch, labels)` of a sequence head, `(batch, length, labels)` of a token or mask head, and
            `(batch, length, 2)`, start and end, of a span head.
        hidden_states: The output of the embeddings, then of each layer: `(batch, length, hidden)`; empty by default.
            If a norm follows the last layer (ModernBERT, decoders), the last hidden state is its output.
        queries, keys, values: `(batch, heads, length, head_dim)` by layer, from 1; empty by default. Keys and values
            have a head for each group of queries. They are taken before any norm or rotation.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    queries: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    values: Mapping[int, Tensor] = field(default_factory=dict)


def observe(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    needs: frozenset[str] = frozenset(),
    layers: frozenset[int] | None = None,
) -> Observation:
    """Runs a forward pass with the inputs that the model takes.

    Queries, keys and values are caught at the linear layers that compute them, so any attention implementation works
    (SDPA, flash), and no attention map is stored.

    Args:
        model: A Hugging Face model with its head.
        inputs: Token tensors; those that the model does not take, such as token types, are left out.
        needs: Any of `hidden_states`, `queries`, `keys`, `values`.
        layers: The layers, from 1, whose queries, keys and values are kept; by default all.
    """
    with _catch_projections(model, needs, layers) as caught:
        output = model(**select_inputs(model, inputs), output_hidden_states="hidden_states" in needs)
    hidden = tuple(output.hidden_states or ()) if "hidden_states" in needs else ()
    return Observation(logits_of_output(output), hidden, caught["queries"], caught["keys"], caught["values"])


def logits_of_output(output: Any) -> Tensor:
    """Returns the logits of a model's output; those of a span head as start and end, `(batch, length, 2)`."""
    if "logits" in output:
        return output.logits
    import torch

    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def select_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the inputs that the model's `forward` names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


@contextmanager
def _catch_projections(
    model: nn.Module, needs: frozenset[str], layers: frozenset[int] | None
) -> Iterator[dict[str, dict[int, Tensor]]]:
    caught: dict[str, dict[int, Tensor]] = {name: {} for name in PROJECTIONS}
    handles = []
    if needs & set(PROJECTIONS):
        modules = spec_of(model).modules
        wanted = {name: caught[name] for name in PROJECTIONS if name in needs}
        catcher = _Catcher(wanted, layers, head_dim_of(model.config))
        places: dict[str, tuple[str, ...]] = {}
        for name, path in zip(PROJECTIONS, (modules.query, modules.key, modules.value), strict=True):
            places[path] = (*places.get(path, ()), name)
        for layer in layers_of(model):
            handles.append(layer.register_forward_pre_hook(catcher.enter))
            for path, names in places.items():
                handles.append(layer.get_submodule(path).register_forward_hook(partial(catcher.catch, names)))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


class _Catcher:
    """Keeps the queries, keys and values of each layer; a layer that runs several times counts as several layers.

    In each run the first call counts: DeBERTa sends its relative positions through the same linear layers later.
    """

    def __init__(self, wanted: Mapping[str, dict[int, Tensor]], layers: frozenset[int] | None, head_dim: int) -> None:
        self.wanted, self.layers, self.head_dim = wanted, layers, head_dim
        self.layer = 0

    def enter(self, _layer: Any, _inputs: Any) -> None:
        self.layer += 1

    def catch(self, names: tuple[str, ...], _module: Any, _inputs: Any, output: Tensor) -> None:
        if self.layers is not None and self.layer not in self.layers:
            return
        # One linear layer may compute all three side by side.
        for name, part in zip(names, output.chunk(len(names), dim=-1), strict=True):
            if name in self.wanted and self.layer not in self.wanted[name]:
                self.wanted[name][self.layer] = part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
