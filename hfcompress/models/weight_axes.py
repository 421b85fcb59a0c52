"""Finds the meaning of each axis of each weight, such as residual stream, heads, neurons or vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfcompress.models.architectures import ModulePaths, spec_of
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import empty_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Axis = tuple[str, ...]
"""The parts that lie side by side along an axis; empty for an axis of anything else.

A part is one of `residual`, `embedding`, `scores` (the dimensions of the heads in queries and keys), `values` (those in
values and in the outputs of the heads), `heads` (one entry for each, the same in all layers), `neurons`, `vocab`,
`positions` and `rank` (the inner width of factorized word embeddings)."""

_HEADS, _HEAD_DIM, _FFN, _EMBEDDING, _RANK, _VOCAB, _POSITIONS = 1009, 4, 3001, 1301, 701, 100_003, 20_011


def axes_of(model: PreTrainedModel) -> dict[str, tuple[Axis, ...]]:
    """Finds the meaning of the axes of each weight, by its name in the state dict.

    They are read from an empty model of the same class in which all sizes differ, so that two equal widths in `model`
    are not confused. Its heads fill the residual width; the architecture's module paths tell these two apart.
    """
    import torch

    modules, shape = spec_of(model).modules, shape_of(model.config.to_dict())
    hidden = _HEADS * _HEAD_DIM * shape.group
    distinct = replace(
        shape.with_layers(len(shape.layers), _HEADS * shape.group, _FFN),
        hidden=hidden,
        head_dim=_HEAD_DIM,
        embedding=_EMBEDDING if shape.embedding else 0,
        embedding_rank=_RANK if shape.embedding_rank else 0,
        vocab=_VOCAB,
        positions=_POSITIONS,
    )
    with torch.device("meta"):
        empty = empty_model(type(model).__name__, distinct, model.config)
    kinds: dict[int, Axis] = {
        hidden: ("residual",),
        _EMBEDDING: ("embedding",),
        _RANK: ("rank",),
        _HEADS * shape.group: ("heads",),
        _FFN: ("neurons",),
        2 * _FFN: ("neurons", "neurons"),
        _VOCAB: ("vocab",),
        _POSITIONS: ("positions",),
    }
    return {
        name: _with_heads(name, tuple(kinds.get(size, ()) for size in tensor.shape), modules)
        for name, tensor in empty.state_dict().items()
    }


def _with_heads(name: str, axes: tuple[Axis, ...], modules: ModulePaths) -> tuple[Axis, ...]:
    rows = tuple(
        part
        for path, part in ((modules.query, "scores"), (modules.key, "scores"), (modules.value, "values"))
        if f".{path}." in name
    )
    if rows:
        return (rows, *axes[1:])
    if name.endswith(f".{modules.attention_output}.weight"):
        return (axes[0], ("values",))
    return axes


def part_of(name: str, model: PreTrainedModel) -> str:
    """Finds the part of a model that a weight belongs to: `embeddings`, `layer N` (from 1) or `head`, the task head.

    The pooler counts as task head; other weights outside the layers count as embeddings.
    """
    base = f"{model.base_model_prefix}."
    if not name.startswith(base) or name.startswith(f"{base}pooler."):
        return "head"
    _, layer, rest = name.partition(f"{spec_of(model).modules.layers}.")
    return f"layer {int(rest.partition('.')[0]) + 1}" if layer else "embeddings"
