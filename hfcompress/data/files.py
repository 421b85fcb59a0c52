"""Reads data files (csv, tsv, jsonl, json, txt, parquet): a text or label is kept as it is spelled in the file.

Python's csv and json modules read text files, and convert nothing. The readers of `datasets` 5.2 (pandas, pyarrow)
change values without an error, even if each column is declared a string: from json, the text `2024-01-02` becomes
`2024-01-02 00:00:00`, the number `7.0` becomes `7`, and 12345678901234567890123 becomes `1.2345678901234568e+22`; in
csv, a row that lacks a field is filled up, and misplaced quotes are dropped. Parquet files have types of their own;
pyarrow reads them, because `datasets` would first copy each into its cache.

Only the columns that the task names are checked.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hfcompress.data.values import (
    SHOWN,
    ColumnType,
    Number,
    Repeated,
    convert_columns,
    features_of,
    read_column,
    show_value,
)
from hfcompress.utils.errors import HfcompressError, did_you_mean, disk_problem

if TYPE_CHECKING:
    import datasets
    import pyarrow

ROWS_AT_ONCE = 10_000
"""The number of rows that are converted together."""
TEXT_COLUMN = "text"
"""The name of the column that holds the lines of a .txt file."""
_FIELD_LIMIT = 2**31 - 1
_QUOTES = 'put a field that holds a quote, a comma or a line end in quotes, and double each quote in it ("")'
_WRAPPERS = {"data", "rows"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_MAGIC = {
    b"\x1f\x8b": ("a gzip archive", "unpack it"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unpack it, or save the sheet as csv in UTF-8"),
    b"PAR1": ("a parquet file", "rename it to .parquet"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8, or say `encoding: utf-16` in the task"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8, or say `encoding: utf-16` in the task"),
}
_ENCODINGS = (
    "save it as UTF-8, or name its encoding (`encoding:` of the task, `--encoding` of init), such as cp1252 (Windows, "
    "western Europe), latin-1, utf-16, gb18030 or shift_jis"
)
Record = tuple[int | None, Sequence[Any]]
"""The line at which a row begins (None if it is not known), and the row's values in the columns that are read."""


@dataclass(frozen=True)
class DataFile(ABC):
    """One split of a data set on this machine.

    Attributes:
        path: The file.
    """

    path: Path

    @abstractmethod
    def columns(self) -> list[str]:
        """Returns the names of the columns.

        Raises:
            HfcompressError: if the file is empty or cannot be read.
        """

    @abstractmethod
    def count(self) -> int:
        """Counts the rows.

        Raises:
            HfcompressError: if the file cannot be read to its end.
        """

    @abstractmethod
    def batches(self, types: dict[str, ColumnType]) -> Iterator[pyarrow.Table]:
        """Yields the rows as tables of at most `ROWS_AT_ONCE` rows; their schemas hold the features of `datasets`.

        Args:
            types: The columns to read, and the type of each.

        Raises:
            HfcompressError: if a column is missing, or a value does not fit its column; names the row.
        """

    @abstractmethod
    def samples(self, most: int) -> list[dict[str, Any]]:
        """Reads all columns of the first rows, as they are spelled.

        Args:
            most: How many rows.
        """

    def read(self, types: dict[str, ColumnType]) -> datasets.Dataset:
        """Reads all rows; the argument and the errors are those of `batches`."""
        import datasets
        import pyarrow

        tables = list(self.batches(types))
        table = pyarrow.concat_tables(tables) if tables else features_of(types).arrow_schema.empty_table()
        features = datasets.Features.from_arrow_schema(table.schema)
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))

    def stream(self, types: dict[str, ColumnType]) -> datasets.IterableDataset:
        """Reads the rows while they are used; the argument and the errors are those of `batches`."""
        import datasets

        arguments = {"file": self, "types": types}
        return datasets.IterableDataset.from_generator(_iterate, features=features_of(types), gen_kwargs=arguments)


def _iterate(file: DataFile, types: dict[str, ColumnType]) -> Iterator[dict[str, Any]]:
    for table in file.batches(types):
        yield from table.to_pylist()


@dataclass(frozen=True)
class TextFile(DataFile):
    """A csv, tsv, jsonl, json or txt file.

    Attributes:
        path: The file.
        encoding: The encoding of its text; a byte order mark is skipped.
    """

    encoding: str = "utf-8"

    def columns(self) -> list[str]:
        """Returns the names of the columns, from the header or the first row."""
        if self.path.suffix == ".txt":
            return [TEXT_COLUMN]
        if self.path.suffix in _SEPARATORS:
            return self._header(self._fields())
        return list(next(self._objects(), (0, {}))[1]) or self._refuse_empty()

    def count(self) -> int:
        """Counts the rows."""
        if self.path.suffix == ".txt":
            return sum(1 for _ in self._lines())
        if self.path.suffix in _SEPARATORS:
            return max(sum(1 for _ in self._fields()) - 1, 0)
        first = next((line for _, line in self._filled_lines()), "")
        if first.lstrip().startswith("["):
            return sum(1 for _ in self._objects())
        return sum(1 for _ in self._filled_lines())

    def batches(self, types: dict[str, ColumnType]) -> Iterator[pyarrow.Table]:
        """Yields the rows as tables; an error names the line of the file."""
        import pyarrow

        schema = features_of(types).arrow_schema
        records, first = self._read_records(list(types)), 0
        while some := list(islice(records, ROWS_AT_ONCE)):
            lines = [line for line, _ in some]
            place = partial(_place, self.path, lines)
            columns = zip(*(values for _, values in some), strict=True)
            arrays = [
                pyarrow.array(read_column(kind, values, name, place, first), schema.field(name).type)
                for (name, kind), values in zip(types.items(), columns, strict=True)
            ]
            yield pyarrow.Table.from_arrays(arrays, schema=schema)
            first += len(some)

    def samples(self, most: int) -> list[dict[str, Any]]:
        names = self.columns()
        return [dict(zip(names, values, strict=True)) for _, values in islice(self._read_records(names), most)]

    def lines(self) -> Iterator[str]:
        """Reads its lines, with their ends."""
        return (line for _, line in self._lines())

    def fields(self) -> Iterator[list[str]]:
        """Reads the header and the rows of a csv or tsv file, as the fields that stand in it."""
        return (fields for _, fields in self._fields())

    def _read_records(self, names: list[str]) -> Iterator[Record]:
        if self.path.suffix == ".txt":
            require_columns(names, [TEXT_COLUMN], self.path.name)
            return ((line, [text.rstrip("\r\n")]) for line, text in self._lines())
        return self._csv_records(names) if self.path.suffix in _SEPARATORS else self._json_records(names)

    # --- lines

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields the lines with their numbers and line ends; a carriage return alone ends a line too."""
        with name_file_in_errors(self.path):
            try:
                with self.path.open(encoding=self.encoding, newline="") as stream:
                    for number, line in enumerate(stream, start=1):
                        yield number, line.removeprefix("\ufeff") if number == 1 else line
            except UnicodeError as error:
                self._refuse_encoding(error)

    def _filled_lines(self) -> Iterator[tuple[int, str]]:
        return ((number, line) for number, line in self._lines() if not line.isspace())

    def _refuse_encoding(self, error: UnicodeError) -> NoReturn:
        with self.path.open("rb") as stream:
            start = stream.read(4)
            what = next((known for magic, known in _MAGIC.items() if start.startswith(magic)), None)
            if what is not None:
                raise HfcompressError(f"{self.path} cannot be read: it is {what[0]}", what[1]) from None
            stream.seek(0)
            place = next((n for n, line in enumerate(stream, 1) if not _decodes(line, self.encoding)), None)
        # In UTF-16 and UTF-32 a line does not end at the byte of a line end.
        where = f"line {place} of it" if place is not None and "\n".encode(self.encoding) == b"\n" else "it"
        reason = getattr(error, "reason", None) or str(error)
        byte = f"byte 0x{error.object[error.start]:02x}: " if isinstance(error, UnicodeDecodeError) else ""
        message = f"{self.path} cannot be read: {where} is not {self.encoding} ({byte}{reason})"
        raise HfcompressError(message, _ENCODINGS) from None

    def _refuse_empty(self) -> NoReturn:
        raise HfcompressError(f"{self.path} is empty", "a data file has a header line and at least one row")

    # --- csv and tsv

    def _fields(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the fields of the header and of each row, with the line where they begin; skips blank lines."""
        csv.field_size_limit(_FIELD_LIMIT)
        quoting: Any = csv.QUOTE_NONE if self.path.suffix == ".tsv" else csv.QUOTE_MINIMAL
        reader = csv.reader(
            (line for _, line in self._lines()),
            delimiter=_SEPARATORS[self.path.suffix],
            quoting=quoting,
            strict=True,
        )
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                message = f"{self.path} cannot be read: the row at line {line} has misplaced quotes ({error})"
                raise HfcompressError(message, _QUOTES) from None
            if fields and not (len(fields) == 1 and fields[0].isspace()):
                yield line, fields

    def _header(self, fields: Iterator[tuple[int, list[str]]]) -> list[str]:
        return next(fields, (0, list[str]()))[1] or self._refuse_empty()

    def _csv_records(self, names: list[str]) -> Iterator[Record]:
        rows = self._fields()
        header = self._header(rows)
        require_columns(names, header, self.path.name)
        places = [header.index(name) for name in names]
        for line, fields in rows:
            if len(fields) != len(header):
                self._refuse_width(line, len(fields), len(header))
            yield line, [fields[place] for place in places]

    def _refuse_width(self, line: int, found: int, expected: int) -> NoReturn:
        fields = "1 field" if found == 1 else f"{found} fields"
        message = f"{self.path} cannot be read: the row at line {line} has {fields}, the header has {expected}"
        raise HfcompressError(message, "fix the row, or the header" if self.path.suffix == ".tsv" else _QUOTES)

    # --- jsonl and json

    def _objects(self) -> Iterator[tuple[int | None, dict[str, Any]]]:
        """Yields the JSON objects of the file, one on each line or all in one list, with their lines."""
        lines, first = self._lines(), True
        for line, text in lines:
            if text.isspace():
                continue
            if first and text.lstrip().startswith("["):
                yield from self._list_objects("".join([text, *(more for _, more in lines)]), line)
                return
            try:
                found = self._decode(text, line)
            except HfcompressError:
                if first and self.path.suffix == ".json":
                    self._refuse_one_object("".join([text, *(more for _, more in lines)]), line)
                raise
            first = False
            yield line, self._require_object(found, f"{self.path}:{line}")

    def _list_objects(self, text: str, first: int) -> Iterator[tuple[None, dict[str, Any]]]:
        rows = self._decode(text, first)
        if not isinstance(rows, list):
            self._require_object(rows, str(self.path))
        for number, row in enumerate(rows):
            yield None, self._require_object(row, f"{self.path}: entry {number} of the list")

    def _decode(self, text: str, first: int) -> Any:
        try:
            return _DECODER.decode(text)
        except json.JSONDecodeError as error:
            line = first + error.lineno - 1
            message = f"{self.path}:{line} is not JSON: {error.msg} (column {error.colno})"
            fix = "a .jsonl file holds one JSON object a line, a .json file may hold a list of them"
            raise HfcompressError(message, fix) from None
        except RecursionError:
            raise HfcompressError(
                f"{self.path}:{first} is nested too deeply to be read", "leave that part out"
            ) from None

    def _require_object(self, row: Any, where: str) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise HfcompressError(f"{where} is not a JSON object: {show_value(row)}", "a row is {COLUMN: VALUE, …}")
        return row

    def _refuse_one_object(self, text: str, first: int) -> None:
        """Refuses a file that is one JSON object over many lines; returns for any other file."""
        try:
            found = self._decode(text, first)
        except HfcompressError:
            return
        if isinstance(found, dict):
            raise HfcompressError(f"{self.path} is one JSON object, not a list of rows", _wrapped(found)) from None

    def _json_records(self, names: list[str]) -> Iterator[Record]:
        for number, (line, row) in enumerate(self._objects()):
            if number == 0:
                require_columns(names, list(row), self.path.name)
            if isinstance(row, Repeated) and (twice := row.names.intersection(names)):
                where = f"{self.path}:{line}" if line is not None else f"{self.path}: entry {number} of the list"
                message = f"{where} gives {show_value(min(twice))} more than once"
                raise HfcompressError(message, "keep one of them")
            yield line, [row.get(name) for name in names]


@dataclass(frozen=True)
class ParquetFile(DataFile):
    """A parquet file, whose columns have types of their own."""

    def columns(self) -> list[str]:
        """Returns the names of the columns."""
        import pyarrow.parquet

        with explain_parquet_errors(self.path):
            return list(pyarrow.parquet.read_schema(self.path).names)

    def count(self) -> int:
        """Reads the number of rows from the end of the file."""
        import pyarrow.parquet

        with explain_parquet_errors(self.path):
            return int(pyarrow.parquet.read_metadata(self.path).num_rows)

    def batches(self, types: dict[str, ColumnType]) -> Iterator[pyarrow.Table]:
        """Yields the rows as tables; a column that fits as it is keeps its feature, such as a `ClassLabel`."""
        import pyarrow.parquet

        require_columns(list(types), self.columns(), self.path.name)
        with explain_parquet_errors(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            first = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(types)):
                yield self._convert(pyarrow.Table.from_batches([batch]), types, first)
                first += len(batch)

    def samples(self, most: int) -> list[dict[str, Any]]:
        import pyarrow.parquet

        with explain_parquet_errors(self.path), pyarrow.parquet.ParquetFile(self.path) as file:
            return list(next(file.iter_batches(most)).to_pylist()) if file.metadata.num_rows else []

    def _convert(self, table: pyarrow.Table, types: dict[str, ColumnType], first: int) -> pyarrow.Table:
        import datasets

        for column in types:
            place, values = table.column_names.index(column), _unify_texts(table[column])
            values.validate(full=True)
            table = table.set_column(place, table.schema.field(column).with_type(values.type), values)
        features = datasets.Features.from_arrow_schema(table.schema)
        rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
        return convert_columns(rows, types, self.path.name, first).data.table


def data_file(path: Path, encoding: str = "utf-8") -> DataFile:
    """Chooses the reader of a file by its suffix."""
    return ParquetFile(path) if path.suffix == ".parquet" else TextFile(path, encoding)


def require_columns(names: Sequence[str], header: Sequence[str], where: str) -> None:
    """Refuses a header that lacks one of the columns, or has it twice.

    Args:
        names: The columns that are read.
        header: The columns that the data has.
        where: The name of the data, for errors.

    Raises:
        HfcompressError: if a column is missing, or there are two of its name.
    """
    for name in names:
        if name not in header:
            raise HfcompressError(f"{where} has no column '{name}'", column_hint(name, header))
        if header.count(name) > 1:
            message = f"{where} has {header.count(name)} columns called '{name}'"
            raise HfcompressError(message, "rename one of them")


def column_hint(name: str, header: Sequence[str]) -> str:
    """Returns advice for a column that the header lacks."""
    only = header[0] if len(header) == 1 else ""
    separator = next((sign for sign in ("\t", ";", "|", ",") if sign in only), None)
    if separator is not None:
        return (
            f"its header is one field, {show_value(only)}: a .csv file separates its "
            "fields by commas, a .tsv file by tabs"
        )
    if any("\0" in entry for entry in header):
        return "its header holds NUL characters: it may be UTF-16; if it is, set `encoding: utf-16` in the task"
    if _WRAPPERS.intersection(header):
        return _wrapped(dict.fromkeys(header))
    return did_you_mean(name, [entry if len(entry) <= SHOWN else f"{entry[:SHOWN]}…" for entry in header[:SHOWN]])


def _wrapped(found: dict[str, Any]) -> str:
    key = next(iter(_WRAPPERS.intersection(found)), None)
    inside = f"take the list out of '{key}'" if key else "take the list of rows out of it"
    return f"{inside}: a .json file holds a list of rows, each {{COLUMN: VALUE, …}}; a .jsonl file one row a line"


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Turns an error of the file system into one that names the file."""
    try:
        yield
    except OSError as error:
        problem = disk_problem(error) or error.strerror or str(error).strip().partition("\n")[0]
        raise HfcompressError(f"{path} cannot be read: {problem}", "check the file and its permissions") from None


@contextmanager
def explain_parquet_errors(path: Path) -> Iterator[None]:
    """Turns an error of the file system or of a parquet reader into one that names the file."""
    with name_file_in_errors(path):
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            message = f"{path} is not a parquet file that can be read: {reason}"
            raise HfcompressError(message, "write it again, or as jsonl") from None


def _unify_texts(values: Any) -> Any:
    """Converts a column of texts of any storage type to `string`; returns any other column as it is."""
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if kinds.is_large_string(values.type) or kinds.is_string_view(values.type):
        values = values.cast(pyarrow.string())
    return values


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _place(path: Path, lines: Sequence[int | None], number: int) -> str:
    line = lines[number]
    return path.name if line is None else f"{path.name}, line {line}"


def _read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Repeated(pairs)


_spelled: Callable[[str], Number] = Number
_DECODER = json.JSONDecoder(
    object_pairs_hook=_read_pairs, parse_int=_spelled, parse_float=_spelled, parse_constant=_spelled
)
