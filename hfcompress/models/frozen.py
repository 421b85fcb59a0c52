"""A model as something to look at: in eval mode, its weights asking for no gradients, as before when that is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module, but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Eval mode, and gradients for no weight but those of `but`, while the context lasts."""
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
