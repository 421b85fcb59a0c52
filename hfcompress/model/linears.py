"""The linear modules inside the transformer layers: what is pruned, weight by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.model.family import family_of

if TYPE_CHECKING:
    from torch import nn


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear modules of the transformer layers, by their names in `model`; shared ones once.

    They are those of the attention and of the FFN. The weight of `name` is `name.weight` in the state dict.
    """
    from torch import nn

    inside = {id(module) for layer in family_of(model).stack(model) for module in layer.modules()}
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    }
