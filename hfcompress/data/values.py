"""The types of columns in a data set, and how their values are read.

A value is read as it is spelled in the file: `007` is a text of three characters, `true` a label of four. A value
without a single spelling as text (a fraction, a date, a list) is refused where a text is needed, never converted.
"""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    import datasets

SHOWN = 120
"""The most characters of a foreign value that an error shows."""
ANSWER_FORM = "an answer is {text: [TEXT, …], answer_start: [CHARACTER, …]}, both of the same length"
_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_SCORE = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_LARGEST = 2**63


class Number(str):
    """A number of a JSON file, as it is spelled there: `7`, `7.0`, `NaN`."""

    def __repr__(self) -> str:
        return str(self)


class Repeated(dict[str, Any]):
    """A JSON object that has some of its keys more than once."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.names = {name for name in names if names.count(name) > 1}


class UnreadableError(ValueError):
    """A value that does not fit the type of its column.

    Attributes:
        fix: Advice for the user.
    """

    def __init__(self, why: str, fix: str = "fix the row, or leave it out") -> None:
        super().__init__(why)
        self.fix = fix


Form = str | list[str] | dict[str, list[str]]
"""A short form of a feature of `datasets`: the type of a value, that in a list, or a dict of such lists."""


@dataclass(frozen=True)
class ColumnType:
    """The type of a column.

    Attributes:
        read: Turns a value of the data into the value that is kept; None stays None. Raises `UnreadableError`.
        form: The feature of the values that are kept.
        keeps: True if a column with this feature already fits, and needs no conversion.
    """

    read: Callable[[Any], Any]
    form: Form
    keeps: Callable[[Any], bool]

    def feature(self) -> Any:
        """Returns the feature of `datasets` for the values that are kept."""
        return _feature(self.form)


def features_of(types: dict[str, ColumnType]) -> datasets.Features:
    """Returns the features of `datasets` for columns of these types."""
    import datasets

    return datasets.Features({name: column_type.feature() for name, column_type in types.items()})


def _feature(form: Form) -> Any:
    import datasets

    if isinstance(form, dict):
        return {name: _feature(inner) for name, inner in form.items()}
    return datasets.Sequence(datasets.Value(form[0])) if isinstance(form, list) else datasets.Value(form)


def is_integer(text: str) -> bool:
    """True if a text is a whole number in its usual spelling: no `+`, no leading zeros, ASCII digits."""
    return _INTEGER.fullmatch(text) is not None


def show_value(value: Any) -> str:
    """Writes a value for a message: a whole number as it is, all else as Python spells it; long values are cut."""
    # A long value is cut first: to spell out all of it would cost much memory.
    long = isinstance(value, (str, bytes, list)) and len(value) > SHOWN
    short = value[: SHOWN + 1] if long else value
    try:
        text = short if isinstance(short, str) and len(short) <= SHOWN and is_integer(short) else repr(short)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def read_column(
    column_type: ColumnType, values: Iterable[Any], column: str, place: Callable[[int], str], first: int = 0
) -> list[Any]:
    """Reads the values of a column.

    Args:
        column_type: The type of the column.
        values: The values in the data.
        column: The name of the column.
        place: Returns the place of the n-th value, for errors.
        first: The number of the first row.

    Raises:
        HfcompressError: if a value does not fit the column; names the row.
    """
    found, read = [], column_type.read
    for number, value in enumerate(values):
        try:
            found.append(read(value))
        except UnreadableError as error:
            message = f"row {first + number} has {show_value(value)} in column '{column}', {error} ({place(number)})"
            raise HfcompressError(message, error.fix) from None
    return found


def convert_columns(
    rows: datasets.Dataset, types: dict[str, ColumnType], place: str, first: int = 0
) -> datasets.Dataset:
    """Selects the columns of a data set that has types of its own, and converts those that do not fit.

    Args:
        rows: The data set.
        types: The columns, and the type that each must have.
        place: The name of the data, for errors.
        first: The number of the first row.

    Raises:
        HfcompressError: if a value does not fit its column; names row, column and type.
    """
    rows = rows.select_columns(list(types))
    for column, column_type in types.items():
        feature = rows.features[column]
        if column_type.keeps(feature):
            continue
        where = f"{place}, whose column has the type {type_name(feature)}"
        if _holds_classes(feature):
            fix = "store the names instead"
            raise HfcompressError(f"the column '{column}' holds class ids, not texts or one label ({where})", fix)
        values = read_column(column_type, rows[column][:], column, partial(_always, where), first)
        rows = rows.remove_columns(column).add_column(column, values, feature=column_type.feature())
    return rows


def _always(where: str, _: int) -> str:
    return where


def type_name(feature: Any) -> str:
    """Names the type of a feature in one or two words."""
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"list of {type_name(inner)}"
    return str(getattr(feature, "dtype", None) or "struct")


def _holds_classes(feature: Any) -> bool:
    return hasattr(getattr(feature, "feature", feature), "names")


def read_text(value: Any) -> str | None:
    """Reads a text; a whole number becomes its digits."""
    if type(value) is str:
        return value if value.isascii() else _require_encodable(value)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Number) and is_integer(value):
        return str(value)
    if isinstance(value, Number):
        raise UnreadableError("a number that can be spelled in several ways", "write it as a text, in quotes")
    raise UnreadableError(f"{_name_type(value)} where a text is needed", "write it as a text")


def read_label(value: Any) -> str | None:
    """Reads one label as it is spelled: a class name or a whole number."""
    if type(value) is bool:
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        raise UnreadableError(
            "a list where one label is needed", "a row must have one label; there is no task for multi-label data yet"
        )
    if isinstance(value, (float, decimal.Decimal)) or (isinstance(value, Number) and not is_integer(value)):
        fix = "write a class as a whole number (1, not 1.0) or as a text"
        raise UnreadableError("a number with a fraction where a label is needed", fix)
    return read_text(value)


def read_score(value: Any) -> float | None:
    """Reads a finite number."""
    if value is None:
        return None
    plain = isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool)
    spelled = isinstance(value, str) and _SCORE.fullmatch(value.strip(" \t"))
    score = float(value) if plain or spelled else math.nan
    if not math.isfinite(score):
        raise UnreadableError("which is not a finite number", "fix the row: a score is spelled like 0.5, -2 or 1e-3")
    return score


def read_words(value: Any) -> list[str] | None:
    """Reads a list of words."""
    return _read_each(value, read_text)


def read_tags(value: Any) -> list[str] | None:
    """Reads a list of labels, one for each word."""
    return _read_each(value, read_label)


def read_answers(value: Any) -> dict[str, list[Any]] | None:
    """Reads answers in SQuAD's form: texts, and the characters at which they start."""
    if value is None:
        return None
    texts, starts = (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    if isinstance(value, Repeated) or not isinstance(texts, list) or not isinstance(starts, list):
        raise UnreadableError("where answers are needed", ANSWER_FORM)
    return {"text": _read_each(texts, read_text) or [], "answer_start": [_read_start(start) for start in starts]}


def _read_start(value: Any) -> int:
    spelled = isinstance(value, Number) and is_integer(value) and len(value) < 20
    if type(value) is not int and not spelled:
        raise UnreadableError(f"whose answer_start holds {show_value(value)}", ANSWER_FORM)
    start = int(value)
    if not -_LARGEST <= start < _LARGEST:
        raise UnreadableError(f"whose answer_start holds {show_value(value)}", ANSWER_FORM)
    return start


def _read_each(value: Any, read: Callable[[Any], str | None]) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        fix = "use jsonl or parquet files, whose columns can hold lists"
        raise UnreadableError("where a list is needed, one entry for each word", fix)
    found = [read(entry) for entry in value]
    if None in found:
        raise UnreadableError("a list with an entry that is missing")
    return found  # type: ignore[return-value]


def _require_encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "a text with half of a surrogate pair, which is no character"
        raise UnreadableError(
            message, "fix the row: the text was cut, or escaped wrongly, when it was written"
        ) from None
    return text


def _name_type(value: Any) -> str:
    known = {bool: "a truth value", list: "a list", dict: "an object", Repeated: "an object", bytes: "bytes"}
    return known.get(type(value)) or f"a {type(value).__name__}"


def _is_value(feature: Any, *names: str) -> bool:
    """True if a feature is a plain value of one of the types."""
    nested = hasattr(feature, "names") or hasattr(feature, "feature")
    return not nested and getattr(feature, "dtype", None) in names


def _is_text(feature: Any) -> bool:
    return _is_value(feature, "string")


def _is_label(feature: Any) -> bool:
    return _is_text(feature) or (hasattr(feature, "names") and hasattr(feature, "str2int"))


def _is_score(feature: Any) -> bool:
    return _is_value(feature, *_NUMBERS)


def _is_list(feature: Any, fits: Callable[[Any], bool]) -> bool:
    inner = getattr(feature, "feature", None)
    return inner is not None and not isinstance(inner, dict) and fits(inner)


def _is_words(feature: Any) -> bool:
    return _is_list(feature, _is_text)


def _is_tags(feature: Any) -> bool:
    return _is_list(feature, _is_label)


def _is_place(feature: Any) -> bool:
    return _is_value(feature, "int32", "int64")


def _is_answers(feature: Any) -> bool:
    return (
        isinstance(feature, dict)
        and _is_words(feature.get("text"))
        and _is_list(feature.get("answer_start"), _is_place)
    )


_NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
TEXT = ColumnType(read_text, "string", _is_text)
LABEL = ColumnType(read_label, "string", _is_label)
SCORE = ColumnType(read_score, "float64", _is_score)
WORDS = ColumnType(read_words, ["string"], _is_words)
TAGS = ColumnType(read_tags, ["string"], _is_tags)
ANSWERS = ColumnType(read_answers, {"text": ["string"], "answer_start": ["int64"]}, _is_answers)
