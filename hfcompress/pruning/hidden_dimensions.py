"""Cuts hidden dimensions out of a model: those of the residual stream, through all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfcompress.distillation.width_importance import select_best
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.models.weight_axes import Axis, axes_of, part_of
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_RESIDUAL: Axis = ("residual",)
Place = tuple[str, int]
"""A weight's name in the state dict, and one of its axes."""


def cut_hidden(model: PreTrainedModel, dims: Sequence[int]) -> PreTrainedModel:
    """Makes a copy of the model that keeps only some hidden dimensions; the model itself is left as it was.

    The others are cut wherever the residual stream is written, normalized or read: in embeddings, projections, norms
    and task head. Attention heads keep their number and width, so the class is the stock one only if the heads still
    fill the hidden width.

    Args:
        model: An encoder or decoder with its task head.
        dims: The dimensions that stay, ascending.

    Raises:
        HfcompressError: if the new hidden width is that of the embeddings, so that no config can express the result.
    """
    import torch

    shape = shape_of(model.config.to_dict())
    kept = kept_indices(model, dims)
    if shape.embedding == len(dims) and not shape.spec.shared_layers:
        raise HfcompressError(
            f"a hidden width of {len(dims)} is the width of the embeddings, and {shape.architecture} then has no "
            "projection between them",
            "keep one dimension more or less",
        )
    small = empty_model(type(model).__name__, replace(shape, hidden=len(dims)), model.config)
    source = model.state_dict()
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            narrow = source[name]
            for axis in range(narrow.dim()):
                if (name, axis) in kept:
                    narrow = narrow.index_select(axis, kept[name, axis].to(narrow.device))
            tensor.copy_(narrow)
    return small.train(model.training)


def kept_indices(model: PreTrainedModel, dims: Sequence[int]) -> dict[Place, Tensor]:
    """Selects the indices that stay along each axis that hidden dimensions, or the pooler's outputs, lie on.

    A config ties the number of the pooler's outputs (`pooler_places`) to the hidden width. As many of them stay as
    hidden dimensions: those with the largest outgoing weights.
    """
    import torch

    axes = axes_of(model)
    places = [(name, axis) for name, kinds in axes.items() for axis, kind in enumerate(kinds) if kind == _RESIDUAL]
    pooled = pooler_places(model, axes)
    state = model.state_dict()
    hidden = state[places[0][0]].shape[places[0][1]]
    require_ascending(dims, hidden, "dimensions")
    kept = dict.fromkeys(places, torch.tensor(dims, dtype=torch.long))
    if pooled:
        outgoing = sum(state[name].float().square().sum(0) for name, axis in pooled if axis == 1)
        kept |= dict.fromkeys(pooled, select_best(outgoing, len(dims), hidden).cpu())  # type: ignore[arg-type]
    return kept


def pooler_places(model: PreTrainedModel, axes: Mapping[str, tuple[Axis, ...]]) -> list[Place]:
    """Lists the places that the outputs of the task head's own dense layer (such as a pooler) lie on.

    They are as wide as the residual stream, but no part of it. The list is empty if the task head has no such layer,
    and for a mask head: the outputs of its dense layer are compared with the word embeddings.
    """
    head = {name: kinds for name, kinds in axes.items() if part_of(name, model) == "head"}
    dense = [name for name, kinds in head.items() if kinds == (_RESIDUAL, _RESIDUAL)]
    if not dense or (("vocab",), _RESIDUAL) in head.values():
        return []
    places = [(name, axis) for name, kinds in head.items() for axis, kind in enumerate(kinds) if kind == _RESIDUAL]
    return [place for place in places if place != (dense[0], 1)]


def require_ascending(kept: Sequence[int], count: int, noun: str) -> None:
    """Raises a ValueError unless `kept` are some of the indices 0 to `count` - 1, ascending."""
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(f"{noun} that stay must be some of 0 to {count - 1}, ascending: {list(kept)}")
