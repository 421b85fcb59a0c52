"""Rows of a data set on the Hub with all their columns, for `hfcompress init`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfcompress.data.objects import spell_class_names
from hfcompress.data.source import SUFFIXES, read_hub_rows
from hfcompress.utils.errors import HfcompressError


def is_hub_id(data: str) -> bool:
    """True for `owner/name` or `owner/name@revision` that is no file or directory here."""
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", data.partition("@")[0])
    return bool(named) and Path(data).suffix not in SUFFIXES and not Path(data).exists()


def read_samples(data: str, config: str | None, most: int) -> list[dict[str, Any]]:
    """Reads the first rows of the train split, with the names of classes.

    Raises:
        HfcompressError: if the Hub has no such data set, or it has no train split.
    """
    try:
        rows = read_hub_rows(data, config, "train")
    except HfcompressError as error:
        here = f"{data} is no file or directory here"
        raise HfcompressError(replace(p, message=f"{here}; {p.message}") for p in error.problems) from error
    if rows is None:
        raise HfcompressError(f"the data set {data} has no train split", "save its rows as a file, and name that")
    found: list[dict[str, Any]] = spell_class_names(rows.select(range(min(most, len(rows))))).to_list()
    return found


def save_splits(data: str, config: str | None, label: str | None, folder: Path) -> Path:
    """Saves the train and the test split as parquet files; a test split without any label is left out.

    Args:
        data, config: The data set.
        label: The column with the labels; None for raw text.
        folder: A directory.

    Returns:
        The directory.
    """
    for split in ("train", "test"):
        rows = read_hub_rows(data, config, split)
        if rows is None:
            continue
        rows = spell_class_names(rows)
        if split == "train" or label is None or any(value is not None for value in rows[label][:]):
            rows.to_parquet(str(folder / f"{split}.parquet"))
    return folder
