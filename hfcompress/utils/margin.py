"""The largest drop that a user accepts: `1%` of the source's score, or `0.01` of the metric."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

_HINT = "write '1%' for one hundredth of the source's score, or 0.01 for an absolute drop"


@dataclass(frozen=True)
class Margin:
    """The largest drop that is accepted.

    Attributes:
        value: A share of the source's score, or a difference of the metric: more than 0 and less than 1.
        relative: True if it is a share of the source's score.
    """

    value: float
    relative: bool

    def of(self, score: float) -> float:
        """The drop in units of the metric that is accepted from a source with this score."""
        return self.value * abs(score) if self.relative else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.10g}%" if self.relative else f"{self.value:.10g}"


def parse_margin(value: Any) -> Margin:
    """Reads `"1%"` as relative and `0.01` as absolute.

    Raises:
        ValueError: if it is neither, or could be both: 1 may mean 1% or one point.
    """
    if isinstance(value, Margin):
        return value
    text = str(value).strip()
    number = re.fullmatch(r"\+?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*(%?)", text, re.IGNORECASE)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or number is None:
        raise ValueError(f"a margin is a share or a number, not {value!r}; {_HINT}")
    relative = bool(number[3])
    size = float(text.rstrip("% ")) / (100 if relative else 1)
    if size == 0:
        raise ValueError("a margin of 0 can never be shown: no number of rows rules out the smallest drop; " + _HINT)
    if size >= 1:
        unit = "100% or more of the score" if relative else f"ambiguous, {text}% of the score or {text} of the metric"
        raise ValueError(f"a margin of {text} is {unit}; {_HINT}")
    return Margin(size, relative)


def spell_margin(margin: Margin) -> str | float:
    """The margin as a recipe spells it: `1%` or 0.01."""
    return str(margin) if margin.relative else margin.value


_Spelled = Annotated[str, Field(pattern=r"^\s*\+?(\d+\.?\d*|\.\d+)\s*%?\s*$")] | Annotated[float, Field(gt=0, lt=1)]
AnyMargin = Annotated[
    Margin, BeforeValidator(parse_margin, json_schema_input_type=_Spelled), PlainSerializer(spell_margin)
]
"""A field of options that takes `1%` or `0.01`."""
