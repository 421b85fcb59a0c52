"""Splits one data file into train, dev and test, without a text that stands in two of them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.files import TextFile, data_file
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDS = 10
"""A tenth of the rows is the dev split, another tenth the test split."""


def normalize(text: str) -> str:
    """Removes what does not make two texts different: case, and how much white space there is."""
    return " ".join(text.split()).casefold()


def split_rows(texts: Sequence[str], classes: Sequence[Any], seed: int) -> dict[str, list[int]]:
    """Divides rows into train, dev and test, 8 to 1 to 1.

    Rows with the same text stay together, so that no split tests what another has taught. Each split has about the same
    share of each class (`StratifiedGroupKFold` of scikit-learn); classes with fewer than ten rows are spread as
    one, and train has at least one row of each class.

    Args:
        texts: The text of each row.
        classes: The class of each row, or one value for all of them.
        seed: Decides which rows go where.

    Returns:
        By split, the numbers of its rows, in order.

    Raises:
        HfcompressError: for fewer than ten different texts.
    """
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    _, groups = np.unique([normalize(text) for text in texts], return_inverse=True)
    _, known, sizes = np.unique([str(value) for value in classes], return_inverse=True, return_counts=True)
    strata = np.where(sizes[known] < FOLDS, -1, known)  # too few for each fold: they are spread as one class
    if groups.max(initial=-1) + 1 < FOLDS:
        raise HfcompressError(
            f"there are {groups.max(initial=-1) + 1} different texts, too few to split into train, dev and test",
            "add rows; a model that is to be judged needs some hundreds",
        )
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of the rare classes, if they are fewer than ten rows together
        warnings.simplefilter("ignore", UserWarning)
        folds: list[NDArray[Any]] = [fold for _, fold in splitter.split(groups, strata, groups)]
    test, dev, *rest = folds
    train = np.concatenate(rest)
    unlearned = np.flatnonzero(~np.isin(known, known[train]))  # a class that train lacks cannot be tested
    moved = np.flatnonzero(np.isin(groups, groups[unlearned]))
    splits = {"train": np.union1d(train, moved), "dev": np.setdiff1d(dev, moved), "test": np.setdiff1d(test, moved)}
    return {split: rows.tolist() for split, rows in splits.items()}


def write_splits(file: Path, numbers: dict[str, list[int]], folder: Path, encoding: str = "utf-8") -> list[Path]:
    """Writes some rows of a file into one file for each split, with all of its columns, spelled as they are.

    Args:
        file: A csv, tsv, jsonl, json, txt or parquet file.
        numbers: By split, the numbers of its rows.
        folder: Where `train`, `dev` and `test` are written, in UTF-8 and with the suffix of the file (`.jsonl` for
            `.json`).
        encoding: The encoding of the file.

    Returns:
        The files.
    """
    source = data_file(file, encoding)
    if not isinstance(source, TextFile):
        return _write_parquet(file, numbers, folder)
    head, rows = _read_spelled_rows(source)
    suffix = ".jsonl" if file.suffix == ".json" else file.suffix
    paths = []
    for split, chosen in numbers.items():
        paths.append(folder / f"{split}{suffix}")
        write_text(paths[-1], head + "".join(rows[number] for number in chosen))
    return paths


def _write_parquet(file: Path, numbers: dict[str, list[int]], folder: Path) -> list[Path]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    paths = [folder / f"{split}.parquet" for split in numbers]
    for path, chosen in zip(paths, numbers.values(), strict=True):
        pyarrow.parquet.write_table(table.take(chosen), path)
    return paths


def _read_spelled_rows(source: TextFile) -> tuple[str, list[str]]:
    """The header of a text file, empty if it has none, and the text of each of its rows."""
    suffix = source.path.suffix
    if suffix in (".csv", ".tsv"):
        head, *rows = (_join_fields(fields, suffix) for fields in source.fields())
        return head, rows
    if suffix == ".txt":
        return "", [line.rstrip("\r\n") + "\n" for line in source.lines()]
    lines = [line for line in source.lines() if not line.isspace()]
    if lines and lines[0].lstrip().startswith("["):
        return "", [text + "\n" for text in _listed_objects("".join(lines))]
    return "", [line.rstrip("\r\n") + "\n" for line in lines]


def _join_fields(fields: list[str], suffix: str) -> str:
    if suffix == ".tsv":
        return "\t".join(fields) + "\n"
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(fields)
    return line.getvalue()


def _listed_objects(text: str) -> Iterator[str]:
    """The objects of a JSON list as they are spelled, each on a line: a JSON string holds no line end."""
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if place >= len(text) or text[place] == "]":
            return
        _, end = decoder.raw_decode(text, place)
        yield text[place:end].replace("\r", " ").replace("\n", " ")
        place = end
