"""The sparsity pattern: which weights of the linear layers become zero. Options alone, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.utils.errors import Problem
from hfcompress.utils.strict_model import StrictModel


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_pair)]


class Pattern(StrictModel):
    """Which weights of the layers' linear modules become zero."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the weights that become zero; `n_of_m` fixes it."""
    scope: Literal["row", "layer", "global"] = "layer"
    """Where weights are compared: within an output row, within a matrix, or over all of them."""
    n_of_m: Pair | None = None
    """Of each `m` weights side by side along the input, `n` stay: `[2, 4]` is what sparse tensor cores multiply."""
    block: Pair = (1, 1)
    """Rows and columns of weights that become zero together."""

    @model_validator(mode="after")
    def _one_way(self) -> Pattern:
        if (self.share is None) == (self.n_of_m is None):
            raise ValueError("say either `share` or `n_of_m`")
        if self.n_of_m is not None:
            n, m = self.n_of_m
            if n >= m:
                raise ValueError(f"`n_of_m: [{n}, {m}]` keeps everything; the first is less than the second")
            if self.says("scope", "block"):
                raise ValueError("`n_of_m` says where zeros are; leave `scope` and `block` out")
        return self

    @property
    def zeros(self) -> float:
        """Share of the weights that become zero."""
        if self.n_of_m is not None:
            return 1 - self.n_of_m[0] / self.n_of_m[1]
        assert self.share is not None
        return self.share

    def untiled(self, name: str, height: int, width: int) -> Problem | None:
        """Why groups or blocks do not tile a matrix of `height` outputs and `width` inputs; None where they do."""
        rows, columns = (1, self.n_of_m[1]) if self.n_of_m else self.block
        if height % rows == 0 and width % columns == 0:
            return None
        what = f"groups of {columns} along the input" if self.n_of_m else f"blocks of {rows} x {columns}"
        return Problem(
            f"{name} is {height} x {width}, which {what} do not tile", "choose sizes that divide every matrix"
        )

    def at(self, done: float) -> Pattern:
        """The pattern when so much of the cutting is done; one of `n_of_m` is either whole or not there."""
        return self if self.n_of_m else self.model_copy(update={"share": self.zeros * done})
