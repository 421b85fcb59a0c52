"""Drops whole layers of a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import spec_of
from hfcompress.models.shape import Shape, shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.pruning.hidden_dimensions import require_ascending
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def drop_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Makes a copy of the model that keeps only some of its layers; the model itself is left as it was.

    Each layer keeps its heads and neurons, and its kind of attention. If all layers share their weights (ALBERT), the
    one set of weights runs as often as layers are kept.

    Args:
        model: An encoder or decoder with its task head.
        kept: The layers that stay, from 0, ascending.

    Raises:
        HfcompressError: if no config can express the result.
    """
    import torch

    shape = shape_of(model.config.to_dict())
    require_ascending(kept, len(shape.layers), "layers")
    if problem := _find_problem(shape, model.config.to_dict(), kept):
        raise HfcompressError(problem, "keep other layers")
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


def find_required_layers(shape: Shape) -> tuple[int, ...]:
    """Lists the layers, from 0, that `drop_layers` cannot drop: ModernBERT's first has no norm before its attention."""
    return (0,) if shape.spec.modern else ()


def _find_problem(shape: Shape, config: Mapping[str, Any], kept: Sequence[int]) -> str | None:
    """Returns the reason if no config can express a model of these layers, else None."""
    lost = [layer + 1 for layer in find_required_layers(shape) if layer not in kept]
    if lost:
        return f"layer {lost[0]} of {shape.architecture} must stay: unlike the others, it has no norm before attention"
    every = config.get("global_attn_every_n_layers")
    if not config.get("layer_types") and every and any(bool(i % every) != bool(k % every) for i, k in enumerate(kept)):
        return (
            f"one layer in {every} of {shape.architecture} attends to the whole text, and transformers before 5 counts "
            "layers to tell which: these layers would change their kind of attention"
        )
    return None
