"""What a forward pass shows: logits, hidden states, and the queries and keys behind the attention scores."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.model.family import family_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Observed:
    """One forward pass.

    Attributes:
        logits: `(batch, labels)`.
        hidden_states: The embeddings' output, then each layer's: `(batch, length, hidden)`; empty unless asked for.
        queries, keys: One tensor a layer, `(batch, heads, length, head_dim)`; empty unless asked for.
    """

    logits: Tensor
    hidden_states: tuple[Tensor, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()


def observe(model: nn.Module, inputs: Mapping[str, Tensor], needs: frozenset[str] = frozenset()) -> Observed:
    """A forward pass with the inputs that the model takes.

    Queries and keys are caught at the linear layers that make them, so any attention implementation can stay on
    (SDPA, flash): no attention map is stored.

    Args:
        model: A Hugging Face encoder with its head.
        inputs: Token tensors; those the model does not take (another family's token types) are left out.
        needs: Any of `hidden_states`, `queries_keys`.
    """
    with _caught_projections(model, "queries_keys" in needs) as caught:
        output = model(**accepted(model, inputs), output_hidden_states="hidden_states" in needs)
    return Observed(
        output.logits,
        tuple(output.hidden_states or ()) if "hidden_states" in needs else (),
        tuple(caught["query"]),
        tuple(caught["key"]),
    )


def accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the inputs that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


@contextmanager
def _caught_projections(model: nn.Module, wanted: bool) -> Iterator[dict[str, list[Tensor]]]:
    caught: dict[str, list[Tensor]] = {"query": [], "key": []}
    handles = []
    if wanted:
        family = family_of(model)
        head_dim = model.config.hidden_size // model.config.num_attention_heads  # type: ignore[union-attr,operator]
        for layer in family.stack(model):
            for name in caught:
                module = layer.get_submodule(getattr(family, name))
                handles.append(module.register_forward_hook(partial(_catch, caught[name], head_dim)))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def _catch(caught: list[Tensor], head_dim: Any, _module: Any, _inputs: Any, output: Tensor) -> None:
    batch, length, _ = output.shape
    caught.append(output.view(batch, length, -1, head_dim).transpose(1, 2))
