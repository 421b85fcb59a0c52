"""The answers of several models to the same rows, kept once: comparisons are computed from them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.utils.files import new_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

FILE = "predictions.parquet"


@dataclass(frozen=True)
class Answer:
    """The answers of one model to the judged units, in the order of the data.

    Attributes:
        predictions: One a unit: a class id, a score, a list of tags, a text, or counts of masked tokens.
        references: What is right, in the same form.
        logits: `(units, classes)` of a classifier of texts; None for any other model.
        lengths: `(units,)` tokens, if a unit is a row; else None.
    """

    predictions: Array
    references: Array
    logits: Array | None = None
    lengths: Array | None = None


@dataclass(frozen=True)
class Answers:
    """The answers of all models of a report.

    Attributes:
        source: The answers of the source.
        others: Those of each other model, in the order of the rows of the report, with the classes numbered as the
            source numbers them; None for a model that was asked other units, such as the masked blocks of another
            tokenizer.
    """

    source: Answer
    others: Sequence[Answer | None]


def align(answers: Sequence[Answer]) -> Answers:
    """Puts the answers of several models side by side, the source first."""
    source, *rest = answers
    return Answers(source, [_like(source, answer) for answer in rest])


def _like(source: Answer, other: Answer) -> Answer | None:
    """The answers of another model with the class ids of the source; None if the units are not the same."""
    import numpy as np

    if len(source.references) != len(other.references):
        return None
    if other.logits is None or source.logits is None:
        same = all(np.array_equal(a, b) for a, b in zip(source.references, other.references, strict=True))
        return other if same else None
    ids = _match_ids(source.references, other.references, max(source.logits.shape[1], other.logits.shape[1]))
    if ids is None:
        return None
    predictions = np.array([ids[int(number)] for number in other.predictions])
    order = sorted(ids, key=ids.__getitem__)
    logits = other.logits[:, order] if source.logits.shape == other.logits.shape else None
    return Answer(predictions, source.references, logits, other.lengths)


def _match_ids(source: Array, other: Array, classes: int) -> dict[int, int] | None:
    """By class id of a model the source's id of the same class; None if they do not stand for the same classes.

    Both give the right class of each row, so the rows tell. A class that no row has gets an id that is left.
    """
    pairs = {(int(theirs), int(ours)) for theirs, ours in zip(other, source, strict=True)}
    ids = dict(pairs)
    if len(pairs) != len(ids) or len(set(ids.values())) != len(ids):
        return None
    unseen = (number for number in range(classes) if number not in ids)
    left = [number for number in range(classes) if number not in ids.values()]
    for number in unseen:  # the same id if it is free: most models number their classes alike
        ids[number] = left.pop(left.index(number) if number in left else 0)
    return ids


def write_answers(answers: Answers, stages: Sequence[str], path: Path) -> None:
    """Writes answers as a parquet file, one line a unit: `reference`, `length`, and the columns of each model.

    Args:
        answers: The answers.
        stages: The names of the models, the source first.
        path: The file.
    """
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {"reference": answers.source.references.tolist()}
    if answers.source.lengths is not None:
        columns["length"] = answers.source.lengths.tolist()
    for number, (stage, answer) in enumerate(zip(stages, [answers.source, *answers.others], strict=True)):
        if answer is not None:
            columns[f"{number} {stage}"] = answer.predictions.tolist()
            if answer.logits is not None:
                columns[f"{number} {stage} logits"] = answer.logits.astype("float32").tolist()
    with new_file(path) as scratch:
        pyarrow.parquet.write_table(pyarrow.table(columns), scratch)


def read_answers(path: Path, stages: Sequence[str]) -> Answers | None:
    """Reads what `write_answers` wrote; None if there is no such file, or it is of other models."""
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        return None
    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError):
        return None
    names = [f"{number} {stage}" for number, stage in enumerate(stages)]
    if names[0] not in columns or any(_owner(name) not in {*names, ""} for name in columns):
        return None
    source, *others = (_answer_in(columns, name) for name in names)
    assert source is not None
    return Answers(source, others)


def _owner(column: str) -> str:
    """The model of a column; empty for the columns of all models."""
    return "" if column in ("reference", "length") else column.removesuffix(" logits")


def _answer_in(columns: Mapping[str, list[Any]], name: str) -> Answer | None:
    import numpy as np

    from hfcompress.data.metrics import as_array

    if name not in columns:
        return None
    logits, lengths = columns.get(f"{name} logits"), columns.get("length")
    return Answer(
        as_array(columns[name]),
        as_array(columns["reference"]),
        None if logits is None else np.array(logits, dtype="float32"),
        None if lengths is None else np.array(lengths),
    )
