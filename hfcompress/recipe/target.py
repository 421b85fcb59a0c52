"""The `search:` block of a recipe: the limits that the best model must keep to, and the time for finding it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hfcompress.utils.margin import AnyMargin, Margin
from hfcompress.utils.strict_model import StrictModel


class Target(StrictModel):
    """What a search looks for: the model with the best `goal` among those that keep to all limits."""

    max_drop: AnyMargin = Margin(0.01, relative=True)
    """The largest loss of quality: `1%` of the source's score, or `0.01` of the metric. A model keeps to it if a larger
    loss is ruled out on the dev split (one-sided, 5%)."""
    goal: Literal["latency", "size"] = "latency"
    """`latency` looks for the largest speed-up (the geometric mean over `measure.latency.batch_sizes`), `size` for the
    smallest weight files."""
    hours: float = Field(default=1.0, gt=0, le=1000)
    """Time for the whole search, with the last measurement."""
    min_speedup: float | None = Field(default=None, gt=0)
    """How many times faster than the source the model must be, at each batch size."""
    max_mb: float | None = Field(default=None, gt=0)
    """The largest size of its weight files, in MB."""
    backends: list[Annotated[str, Field(min_length=1)]] = []
    """Backends that are tried; by default all that write graphs for a CPU and are installed here."""
