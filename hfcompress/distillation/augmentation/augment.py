"""Augmentation: writes a data set of the rows, and of copies with replaced words.

Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, Algorithm 1.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.distillation.augmentation.replacements import MaskedWords, Slots, propose
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import remove
from hfcompress.utils.hashing import hash_file
from hfcompress.utils.lock import shared_directory
from hfcompress.utils.logging import log
from hfcompress.utils.places import local_path

if TYPE_CHECKING:
    import datasets
    import pyarrow

ORIGIN = "augmented_from"
"""The column with the number of the original row of each new row; empty for original rows."""
DATA, RECORD = "train.parquet", "lineage.json"
DRAWS = 5
"""The most texts to draw for each wanted copy: short texts have few variants."""
ROWS_AT_ONCE = 4096

Keep = Callable[["datasets.Dataset"], Sequence[bool]]


def augment(
    rows: datasets.Dataset,
    columns: Sequence[str],
    options: Any,
    *,
    seed: int,
    directory: Path,
    identity: Mapping[str, Any],
    mlm: Path,
    keep: Keep | None = None,
    device: str = "cpu",
    bfloat16: bool = False,
) -> dict[str, int]:
    """Writes the rows and the new ones, unless the directory has the complete result already.

    The directory gets `train.parquet` (the rows, then the new ones, with `augmented_from`) and `lineage.json`.

    Args:
        rows: Raw rows.
        columns: The text column, or the two of a pair: one of them is rewritten at a time.
        options: An `Augment` block.
        seed: The seed of the replacements: those of a row depend neither on the batch size nor on other rows.
        directory: The directory to write; it is written beside its place and renamed.
        identity: All that the result depends on, as JSON: options, weights, data, seed, versions.
        mlm: A directory with the masked-language model.
        keep: Returns for some new rows which of them to keep; by default all are kept.
        device: The device of the masked-language model.
        bfloat16: True if it computes in bfloat16.

    Returns:
        Counts: `originals`, `generated` (and kept), `dropped` by `keep`, and `duplicates`, the missing copies of rows
        with too few words to replace.

    Raises:
        HfcompressError: for a model that cannot fill in masks, a damaged file of word vectors, or augmented rows.
    """
    require_fresh(rows)
    fault = find_fault(directory, identity)
    if fault is None:
        counts: dict[str, int] = json.loads((directory / RECORD).read_text(encoding="utf-8"))["counts"]
        log.info(f"augmentation: {_summary(counts)}, read from {directory}")
        return counts
    if directory.exists():
        log.info(f"augmentation: {directory} is made again, because {fault}")
        remove(directory)
    model = MaskedWords(mlm, options.top_k, device, bfloat16)
    texts = {column: [str(text) for text in rows[column]] for column in columns}
    glove = local_path(options.glove) if options.glove else None
    slots = propose((text for side in texts.values() for text in side), model, glove, options.batch_size)
    with shared_directory(directory) as scratch:
        counts = _write(scratch / DATA, rows, texts, slots, options, seed, keep)
        record = {"identity": dict(identity), "counts": counts, "sha256": hash_file(scratch / DATA)}
        (scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    log.info(f"augmentation: {_summary(counts)}, kept in {directory}")
    return counts


def require_fresh(rows: datasets.Dataset) -> None:
    """Checks that rows are not augmented already.

    Raises:
        HfcompressError: if they are.
    """
    if ORIGIN in rows.column_names:
        raise HfcompressError(f"the data has a column '{ORIGIN}': it is augmented already", "leave out `augment`")


def read_augmented(directory: Path) -> datasets.Dataset:
    """Reads the rows that `augment` wrote, with the columns of raw rows."""
    import datasets

    return datasets.Dataset.from_parquet(str(directory / DATA)).remove_columns(ORIGIN)


def find_fault(directory: Path, identity: Mapping[str, Any]) -> str | None:
    """Finds the reason why the data set in a directory cannot be used; None if it can."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        made_from, expected = record["identity"], record["sha256"]
        found = hash_file(directory / DATA)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({type(error).__name__})"
    if made_from != json.loads(json.dumps(dict(identity))):
        return "it was made from something else"
    return None if found == expected else f"{DATA} is damaged"


def _summary(counts: Mapping[str, int]) -> str:
    left_out = f"{counts['dropped']:,} dropped by the teacher, {counts['duplicates']:,} only duplicates"
    return f"{counts['generated']:,} new rows beside {counts['originals']:,} ({left_out})"


def _write(
    path: Path,
    rows: datasets.Dataset,
    texts: Mapping[str, list[str]],
    slots: Mapping[str, Slots],
    options: Any,
    seed: int,
    keep: Keep | None,
) -> dict[str, int]:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = rows.with_format("arrow")[:]
    counts = {"originals": len(rows), "generated": 0, "dropped": 0, "duplicates": 0}
    features = datasets.Features({**rows.features, ORIGIN: datasets.Value("int64")})
    with pyarrow.parquet.ParquetWriter(path, features.arrow_schema) as writer:
        writer.write_table(_add_origin(table, pyarrow.nulls(len(rows), pyarrow.int64()), features))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(rows))
            new = list(_new_rows(range(start, stop), texts, slots, options, seed))
            counts["duplicates"] += (stop - start) * len(texts) * options.copies - len(new)
            made = _copy_rows(table, texts, new, features)
            if keep is not None and new:
                raw = made.select(rows.column_names).to_pydict()
                kept = keep(datasets.Dataset.from_dict(raw, features=rows.features))
                counts["dropped"] += len(made) - sum(kept)
                made = made.filter(pyarrow.array(kept, pyarrow.bool_()))
            counts["generated"] += len(made)
            writer.write_table(made)
    return counts


def _new_rows(
    numbers: range, texts: Mapping[str, list[str]], slots: Mapping[str, Slots], options: Any, seed: int
) -> Iterator[tuple[int, str, str]]:
    """Yields a row number, the column that is rewritten, and its new text."""
    for number in numbers:
        for side, (column, values) in enumerate(texts.items()):
            draw = random.Random(f"{seed}/{number}/{side}")
            text = values[number]
            for new in rewrite(text, slots[text], options.copies, options.probability, draw):
                yield number, column, new


def rewrite(text: str, slots: Slots, copies: int, probability: float, draw: random.Random) -> list[str]:
    """Writes at most `copies` new texts, all different from each other and from the old one.

    Args:
        text: The old text.
        slots: The places of its words, and the candidates for each.
        copies: The number of new texts that are wanted.
        probability: The probability that a word is replaced.
        draw: The random generator for words and replacements.
    """
    places = [(span, words) for span, words in sorted(slots.items()) if words]
    made: dict[str, None] = {}
    for _ in range(copies * DRAWS if places and probability else 0):
        new, end = "", 0
        for (start, stop), words in places:
            if draw.random() < probability:
                new += text[end:start] + _match_case(draw.choice(words), text[start:stop])
                end = stop
        new += text[end:]
        if new != text:
            made[new] = None
        if len(made) == copies:
            break
    return list(made)


def _match_case(word: str, old: str) -> str:
    """Gives a word the capitals of the old one; other capitals stay."""
    if len(old) > 1 and old.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if old[0].isupper() else word


def _copy_rows(
    table: pyarrow.Table, texts: Mapping[str, list[str]], new: list[tuple[int, str, str]], features: Any
) -> pyarrow.Table:
    """Copies the rows that new ones are made from, and replaces their texts."""
    import pyarrow

    numbers = pyarrow.array([number for number, _, _ in new], pyarrow.int64())
    made = table.take(numbers)
    for column in {changed for _, changed, _ in new}:
        place = made.column_names.index(column)
        values = [text if changed == column else texts[column][number] for number, changed, text in new]
        made = made.set_column(place, column, pyarrow.array(values))
    return _add_origin(made, numbers, features)


def _add_origin(table: pyarrow.Table, numbers: pyarrow.Array, features: Any) -> pyarrow.Table:
    return table.append_column(ORIGIN, numbers).cast(features.arrow_schema)
