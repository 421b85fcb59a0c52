"""The price of an hour of a machine: `0.40`, or `0.40 EUR`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

_PATTERN = r"^\s*\+?(\d+\.?\d*|\.\d+)\s*([A-Za-z]{1,12}|[$€£¥₹])?\s*$"


@dataclass(frozen=True)
class Price:
    """The price of an hour.

    Attributes:
        amount: More than 0.
        currency: A word or a sign; empty if none is given.
    """

    amount: float
    currency: str = ""

    def __str__(self) -> str:
        return f"{self.amount:.10g} {self.currency}".rstrip()


def parse_price(value: Any) -> Price:
    """Reads `0.40` and `"0.40 EUR"`.

    Raises:
        ValueError: if it is no amount above 0, with or without a currency.
    """
    if isinstance(value, Price):
        return value
    found = re.match(_PATTERN, str(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float) or found is None or not float(found[1]):
        raise ValueError(f"a price is an amount above 0, not {value!r}; write 0.40 or '0.40 EUR' for an hour")
    return Price(float(found[1]), found[2] or "")


def spell_price(price: Price) -> str | float:
    """Spells the price as a recipe does."""
    return str(price) if price.currency else price.amount


_Spelled = Annotated[str, Field(pattern=_PATTERN)] | Annotated[float, Field(gt=0)]
AnyPrice = Annotated[Price, BeforeValidator(parse_price, json_schema_input_type=_Spelled), PlainSerializer(spell_price)]
"""A field of options that takes `0.40` or `0.40 EUR`."""
