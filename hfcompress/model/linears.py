"""The linear modules of a model: what is pruned weight by weight, and what is quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.model.family import family_of

if TYPE_CHECKING:
    from torch import nn


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear modules, those of pooler and head too, by their paths in `model`; shared ones once."""
    from torch import nn

    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the transformer layers: of the attention and of the FFN."""
    inside = {id(module) for layer in family_of(model).stack(model) for module in layer.modules()}
    return {path: module for path, module in linears(model).items() if id(module) in inside}
