"""The seeds that a recipe's models are made with: `seeds: 3`, or `seeds: [1, 2, 3]`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MOST = 20
LARGEST = 2**32 - 1
_HINT = "write 3 for the recipe's seed and the next two, or list them: [1, 2, 3]"


def parse_seeds(value: Any) -> int | list[int] | None:
    """Reads a number of seeds, or a list of different ones.

    Raises:
        ValueError: if it is neither, or there are fewer than two or too many.
    """
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
        raise ValueError(f"seeds are a whole number, or a list of whole numbers, not {value!r}; {_HINT}")
    count = len(value) if isinstance(value, list) else value
    if not 2 <= count <= MOST:
        raise ValueError(f"{count} seeds: there are between 2 and {MOST}; {_HINT}")
    if isinstance(value, list):
        if len(set(value)) < len(value):
            raise ValueError(f"a seed stands twice in {value}; the same seed makes the same models")
        if not all(0 <= seed <= LARGEST for seed in value):
            raise ValueError(f"a seed lies between 0 and {LARGEST}")
    return value  # type: ignore[no-any-return]


_Spelled = (
    Annotated[int, Field(ge=2, le=MOST)]
    | Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Field(min_length=2, max_length=MOST)]
    | None
)
AnySeeds = Annotated[int | list[int] | None, BeforeValidator(parse_seeds, json_schema_input_type=_Spelled)]
"""A field of options that takes `3` or `[1, 2, 3]`."""


def list_seeds(seeds: int | list[int] | None, own: int) -> list[int]:
    """Lists the seeds, the recipe's own first; only that one if no others are named."""
    if isinstance(seeds, list):
        return [own, *(seed for seed in seeds if seed != own)]
    return [own + number for number in range(seeds or 1)]
