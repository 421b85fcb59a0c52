"""The texts of a task's rows; a corpus vocabulary keeps the tokens in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def texts_of(splits: list[datasets.Dataset], columns: list[str]) -> Iterator[str]:
    """Yields every text of the rows; a list of words becomes a text with a space before each word."""
    for rows in splits:
        for column in columns:
            for value in rows[column]:
                yield value if isinstance(value, str) else "".join(f" {word}" for word in value)
