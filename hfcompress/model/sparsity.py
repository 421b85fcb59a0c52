"""Zeros inside the linear layers: which pattern, how many, and what they save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from hfcompress.base.component import Strict

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Pattern(Strict):
    """Which weights of the layers' linear modules become zero."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the weights that become zero; `n_of_m` fixes it."""
    scope: Literal["row", "layer", "global"] = "layer"
    """Where weights are compared: within an output row, within a matrix, or over all of them."""
    n_of_m: tuple[int, int] | None = None
    """Of each `m` weights side by side along the input, `n` stay: `[2, 4]` is what sparse tensor cores multiply."""
    block: tuple[int, int] = (1, 1)
    """Rows and columns of weights that become zero together."""


def zero(model: PreTrainedModel, pattern: Pattern, scores: Mapping[str, Tensor]) -> None:
    """Sets the weights of the lowest scores to zero, in place.

    Args:
        model: The model.
        pattern: How many, and where.
        scores: By the weight's name in the state dict, of its shape.
    """
    raise NotImplementedError
