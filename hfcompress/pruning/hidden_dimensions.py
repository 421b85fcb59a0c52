"""Cutting dimensions of the residual stream, and whole layers: a smaller model that answers as the gated one does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.distillation.width_importance import select_best
from hfcompress.models.architectures import spec_of
from hfcompress.models.shape import Shape, shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.models.weight_axes import Axis, axes_of, part_of
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_RESIDUAL: Axis = ("residual",)
Place = tuple[str, int]
"""A weight's name in the state dict, and one of its axes."""


def cut_hidden(model: PreTrainedModel, dims: Sequence[int], inner: Sequence[int] | None = None) -> PreTrainedModel:
    """A copy of the model whose residual stream keeps only some dimensions; the model itself is left as it was.

    They are cut wherever the stream is written, normed or read: embeddings, every projection, every norm, the head.
    Heads keep their number and width, so the class is the stock one only where the heads still fill the stream.

    Args:
        model: An encoder or decoder with its head.
        dims: The dimensions that stay, ascending.
        inner: As many outputs of the head's own dense layer (a pooler, say), ascending: the config ties their number
            to the width of the stream, though they are no part of it. By default those with the largest outgoing
            weights.

    Raises:
        HfcompressError: where the config of the result would lack the embeddings' projection.
    """
    import torch

    shape = shape_of(model.config.to_dict())
    kept = _kept(model, dims, inner)
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


@contextmanager
def hidden_gated(model: PreTrainedModel, dims: Sequence[int], inner: Sequence[int] | None = None) -> Iterator[None]:
    """While the context lasts, the model answers as `cut_hidden` with the same arguments would.

    What reads the stream sees zeros in place of the other dimensions, and norms are taken over those that stay.
    """
    from torch import nn

    handles = []
    try:
        for (name, axis), index in _kept(model, dims, inner).items():
            path, _, own = name.rpartition(".")
            module: Any = model.get_submodule(path)
            if own != "weight":
                continue
            if axis == 1 and isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(partial(_masked, index)))
            elif module.weight.dim() == 1:
                norm = _Norm(index, module)
                handles.append(module.register_forward_pre_hook(norm.before))
                handles.append(module.register_forward_hook(norm.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def drop_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A copy of the model with only some of its layers; the model itself is left as it was.

    Each layer keeps what is its own: its heads and neurons, and its kind of attention. Where one layer's weights
    serve as all (ALBERT), they run as often as layers are kept.

    Args:
        model: An encoder or decoder with its head.
        kept: The layers that stay, from 0, ascending.

    Raises:
        HfcompressError: where no config can express the result.
    """
    import torch

    shape = shape_of(model.config.to_dict())
    _ascending(kept, len(shape.layers), "layers")
    unsaid = _unsaid(shape, model.config.to_dict(), kept)
    if unsaid:
        raise HfcompressError(unsaid, "keep other layers")
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept]
    layers = tuple(shape.layers[layer] for layer in kept)
    small = empty_model(type(model).__name__, replace(shape, layers=layers), config)
    source, stack = model.state_dict(), spec_of(model).modules.layers
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            before, found, after = name.partition(f"{stack}.")
            number, _, rest = after.partition(".")
            old = f"{before}{found}{kept[int(number)]}.{rest}" if found and not shape.spec.shared_layers else name
            tensor.copy_(source[old])
    return small.train(model.training)


def must_stay(shape: Shape) -> tuple[int, ...]:
    """The layers, from 0, that `drop_layers` cannot drop: ModernBERT's first has no norm before its attention."""
    return (0,) if shape.spec.modern else ()


def _unsaid(shape: Shape, config: Mapping[str, Any], kept: Sequence[int]) -> str | None:
    """Why no config can express a model of these layers, or None where one can."""
    lost = [layer + 1 for layer in must_stay(shape) if layer not in kept]
    if lost:
        return f"layer {lost[0]} of {shape.architecture} must stay: it has no norm before its attention, others do"
    every = config.get("global_attn_every_n_layers")
    if not config.get("layer_types") and every and any(bool(i % every) != bool(k % every) for i, k in enumerate(kept)):
        return (
            f"transformers before 5 lets one layer in {every} of {shape.architecture} attend to the whole text, by its "
            "place, and with these layers it would be others"
        )
    return None


def inner_places(model: PreTrainedModel, axes: Mapping[str, tuple[Axis, ...]]) -> list[Place]:
    """Where the outputs of the head's own dense layer are made, normed and read; none in a head without one.

    A mask head's dense layer has none either: what it gives is held against the word embeddings.
    """
    head = {name: kinds for name, kinds in axes.items() if part_of(name, model) == "head"}
    dense = [name for name, kinds in head.items() if kinds == (_RESIDUAL, _RESIDUAL)]
    if not dense or (("vocab",), _RESIDUAL) in head.values():
        return []
    places = [(name, axis) for name, kinds in head.items() for axis, kind in enumerate(kinds) if kind == _RESIDUAL]
    return [place for place in places if place != (dense[0], 1)]


def _kept(model: PreTrainedModel, dims: Sequence[int], inner: Sequence[int] | None) -> dict[Place, Tensor]:
    """For each place where the stream or the head's inner outputs are, the indices that stay."""
    import torch

    axes = axes_of(model)
    places = [(name, axis) for name, kinds in axes.items() for axis, kind in enumerate(kinds) if kind == _RESIDUAL]
    within = inner_places(model, axes)
    state = model.state_dict()
    hidden = state[places[0][0]].shape[places[0][1]]
    _ascending(dims, hidden, "dimensions")
    if inner is not None:
        if not within or len(inner) != len(dims):
            raise ValueError(f"{len(inner)} inner outputs for {len(dims)} dimensions of {type(model).__name__}")
        _ascending(inner, hidden, "inner outputs")
    kept = dict.fromkeys(places, torch.tensor(dims, dtype=torch.long))
    if within:
        outgoing = [state[name].float().square().sum(0) for name, axis in within if axis == 1]
        chosen = select_best(sum(outgoing), len(dims), hidden) if inner is None else torch.tensor(inner)  # type: ignore[arg-type]
        kept |= dict.fromkeys(within, chosen.cpu())
    return kept


def _ascending(kept: Sequence[int], of: int, what: str) -> None:
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= of:
        raise ValueError(f"{what} that stay must be some of 0 to {of - 1}, ascending: {list(kept)}")


def _mask(index: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[-1]).index_fill(0, index.to(like.device), 1.0)


def _masked(index: Tensor, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * _mask(index, inputs[0]), *inputs[1:])


@dataclass(frozen=True)
class _Norm:
    """Makes a norm over all dimensions one over `index`.

    Where the others are zero and these are centred, the mean square over all N is k/N of that over the k that stay;
    scaling the input by √(N/k) corrects it, so that the module's own epsilon counts as it does in the smaller norm.
    """

    index: Tensor
    module: nn.Module

    def before(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from torch import nn

        x, mask = inputs[0], _mask(self.index, inputs[0])
        if isinstance(self.module, nn.LayerNorm):
            x = x - (x * mask).sum(-1, keepdim=True) / mask.sum()
        return (x * mask / self._scale(mask), *inputs[1:])

    def after(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        mask, bias = _mask(self.index, output), getattr(self.module, "bias", None)
        bias = 0 if bias is None else bias
        return ((output - bias) * self._scale(mask) + bias) * mask

    @staticmethod
    def _scale(mask: Tensor) -> Any:
        return (mask.sum() / mask.numel()) ** 0.5
