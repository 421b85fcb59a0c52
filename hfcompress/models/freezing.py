"""Freezes a model for a while: eval mode and no gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def freeze(model: nn.Module, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Freezes a model while the context lasts: eval mode, and gradients only for the weights in `but`."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for parameter in but}
    try:
        model.eval()
        for parameter, _ in asked:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in asked:
            parameter.requires_grad_(required)
