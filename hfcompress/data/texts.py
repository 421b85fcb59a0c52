"""The texts of a task's rows, which decide what a corpus vocabulary keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def texts_of(splits: list[datasets.Dataset], columns: list[str]) -> Iterator[str]:
    """Every text of some rows; a list of words as words that each follow a space."""
    for rows in splits:
        for column in columns:
            for value in rows[column]:
                yield value if isinstance(value, str) else "".join(f" {word}" for word in value)
