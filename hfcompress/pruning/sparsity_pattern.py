"""The sparsity pattern: the number and the places of the zeros in the linear modules. Options alone, without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.utils.errors import Problem
from hfcompress.utils.strict_model import StrictModel


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Pair = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], BeforeValidator(_list_to_tuple)]


class SparsityPattern(StrictModel):
    """Sets the number and the places of the zeros in the layers' linear modules."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the weights that become zero; not with `n_of_m`."""
    scope: Literal["row", "layer", "global"] = "layer"
    """The weights that are compared: those of an output row, of a matrix (`layer`), or of all matrices."""
    n_of_m: Pair | None = None
    """`[n, m]`: `n` of each `m` neighbouring weights along the input stay. Sparse tensor cores multiply `[2, 4]`."""
    block: Pair = (1, 1)
    """Rows and columns of a block of weights that become zero together."""

    @model_validator(mode="after")
    def _require_one_way(self) -> SparsityPattern:
        if (self.share is None) == (self.n_of_m is None):
            raise ValueError("say either `share` or `n_of_m`")
        if self.n_of_m is not None:
            n, m = self.n_of_m
            if n >= m:
                raise ValueError(
                    f"`n_of_m: [{n}, {m}]` keeps everything; the first number must be less than the second"
                )
            if self.says("scope", "block"):
                raise ValueError("`n_of_m` already decides where zeros are; leave `scope` and `block` out")
        return self

    @property
    def zeros(self) -> float:
        """Share of the weights that become zero."""
        if self.n_of_m is not None:
            return 1 - self.n_of_m[0] / self.n_of_m[1]
        assert self.share is not None
        return self.share

    def find_problem(self, name: str, height: int, width: int) -> Problem | None:
        """Returns a problem if groups or blocks do not divide a matrix `(height, width)`, else None."""
        rows, columns = (1, self.n_of_m[1]) if self.n_of_m else self.block
        if height % rows == 0 and width % columns == 0:
            return None
        what = f"groups of {columns} along the input" if self.n_of_m else f"blocks of {rows} x {columns}"
        return Problem(
            f"{name} is {height} x {width}, and {what} do not divide it", "choose sizes that divide every matrix"
        )

    def at(self, done: float) -> SparsityPattern:
        """Returns the pattern when this share of the cutting is done; `n_of_m` cannot be done in part."""
        return self if self.n_of_m else self.model_copy(update={"share": self.zeros * done})
