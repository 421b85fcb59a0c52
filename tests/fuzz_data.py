"""Data files that hypothesis makes up, with the rows that they mean: read exactly, or refused; nothing else happens.

`test_fuzz_data.py` tries some hundreds of them, `python -m tests.soak.data` as many as asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import io
import json
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from hfcompress.data.files import data_file
from hfcompress.data.sequence import TextClassification
from hfcompress.data.values import LABEL, TEXT
from hfcompress.utils.errors import HfcompressError

Rows = list[tuple[Any, Any]]
TYPES = {"text": TEXT, "label": LABEL}
TRAPS = ["007", "1e5", "1.0", "2.50", "-0", "+1", "1_000", "0x10", "9" * 30, "9" * 5000, "inf", "nan", "NaN", "NA",
         "N/A", "null", "None", "", " ", "true", "True", "FALSE", "2024-01-02", "2024-01-02T03:04:05Z", "10:00", "1,5",
         "a;b", "#x", "'", '"', '""', '"a', 'a"b', "\\", "\\n", "a\tb", "a\nb", "a\rb", "a\r\nb", "\ufeffa", "a\0b",
         "\u2028", "\u0085", "\x0b\x0c", "\x1c\x1d", "\u00a0", "١", "é", "👍", "e\u0301", "=1+1", "[1]", "{}", "a, b",
         "x" * 200_000]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A file, and what it means.

    Attributes:
        suffix: Of its name.
        content: Its bytes.
        rows: Texts and labels; `refused` where it cannot be meant, `either` where anything but a crash is right.
        encoding: That the task names.
    """

    suffix: str
    content: bytes
    rows: Rows | Literal["refused", "either"]
    encoding: str = "utf-8"


def fault_of(made: Made) -> str:
    """What is wrong with how a file is read; empty where all is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "dev"):
            (Path(folder) / f"{split}{made.suffix}").write_bytes(made.content)
        try:
            found = _found(Path(folder), made)
        except Exception:  # whatever it is, it is a fault
            return traceback.format_exc()
    if made.rows == "either" or found == made.rows:
        return ""
    return f"meant {str(made.rows)[:500]}, found {str(found)[:500]}"


def _found(folder: Path, made: Made) -> Rows | str:
    """What is read of a file, three times alike; `refused` where the task refuses it."""
    file = data_file(folder / f"train{made.suffix}", made.encoding)
    task = TextClassification(
        type="text-classification", dataset=str(folder), text=["text"], encoding=made.encoding, max_length=8
    )
    with contextlib.redirect_stderr(io.StringIO()):
        problems = [*task.problems(), *task.label_problems(None)]
    for problem in problems:
        assert len(str(problem)) < 2000, f"an error of {len(str(problem))} characters"
    try:
        rows = file.read(TYPES)
    except HfcompressError:
        assert problems
        return "refused"
    read = list(zip(rows["text"][:], rows["label"][:], strict=True))
    assert file.count() == len(read)
    assert [(row["text"], row["label"]) for row in file.stream(TYPES)] == read
    empty = not read or any(text is None or label in (None, "") for text, label in read)
    assert problems or not empty
    return "refused" if made.rows == "refused" and problems else read


def files() -> st.SearchStrategy[Made]:
    """Files of every kind."""
    return st.one_of(delimited(), objects(), parquet(), refused(), damaged())


def _texts(without: str = "") -> st.SearchStrategy[str]:
    plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=without), max_size=12)
    return st.one_of(plain, st.sampled_from([trap for trap in TRAPS if not set(trap) & set(without)]))


def _rows(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[tuple[str, str]]]:
    return st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


def _encoded(draw: st.DrawFn, suffix: str, text: str, rows: Rows) -> Made:
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16"]))
    return Made(suffix, text.encode(encoding), rows, "utf-16" if encoding == "utf-16" else "utf-8")


@st.composite
def delimited(draw: st.DrawFn) -> Made:
    """csv with quotes where they are needed and at random elsewhere, and tsv without."""
    tabs = draw(st.booleans())
    rows = draw(_rows(_texts("\t\r\n" if tabs else "")))
    names = draw(st.permutations(["text", "label", "id", draw(st.sampled_from(["x", "", "id"]))]))
    table = [dict(zip(["text", "label"], row, strict=True)) for row in rows]
    lines = [list(names), *([row.get(name, "1") for name in names] for row in table)]
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    if not tabs:
        always = draw(st.booleans())
        lines = [[_quoted(field, always) for field in line] for line in lines]
    text = end.join(("\t" if tabs else ",").join(line) for line in lines) + draw(st.sampled_from(["", end, end * 2]))
    return _encoded(draw, ".tsv" if tabs else ".csv", text, list(rows))


def _quoted(field: str, always: bool) -> str:
    return '"' + field.replace('"', '""') + '"' if always or set(field) & set(',"\r\n') else field


@st.composite
def objects(draw: st.DrawFn) -> Made:
    """jsonl, and json lists, pretty or not; whole numbers and truth values are spelled bare here and there."""
    rows: Rows = list(draw(_rows(_texts())))
    ascii_only = draw(st.booleans())
    spelled = []
    for place, (text, label) in enumerate(rows):
        values = {
            name: json.dumps(value, ensure_ascii=ascii_only) for name, value in (("text", text), ("label", label))
        }
        if draw(st.integers(0, 3)) == 0:
            bare = draw(st.one_of(st.integers(-(10**40), 10**40).map(str), st.sampled_from(["true", "false"])))
            values["label"], rows[place] = bare, (text, bare)
        values["other"] = draw(st.sampled_from(["1e999", "[[]]", '{"a": null}', "NaN", "1" * 5000, '"2024-01-02"']))
        parts = [f"{json.dumps(name)}: {values[name]}" for name in draw(st.permutations(list(values)))]
        spelled.append("{" + ", ".join(parts) + "}")
    end, suffix = draw(st.sampled_from(["\n", "\r\n", "\n\n"])), draw(st.sampled_from([".jsonl", ".json"]))
    form = draw(st.sampled_from(["lines", "list", "pretty"]))
    if form == "lines":
        return _encoded(draw, suffix, end.join(spelled) + end, rows)
    join = ", " if form == "list" else f",{end}  "
    return _encoded(draw, suffix, f"[{join.join(spelled)}]{end}", rows)


def _read_as(value: Any) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


_MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5)
_MEANT = {
    "string": _texts(), "large_string": _texts(), "dictionary": _texts(), "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(0, 2**64 - 1), "int8": st.integers(-128, 127), "bool": st.booleans(),
}  # fmt: skip
_NOT_MEANT = {
    "double": 1.0, "binary": b"a", "timestamp": _MOMENT, "date": _MOMENT.date(), "decimal": decimal.Decimal("1.00"),
    "list": ["a"], "struct": {"a": "b"}, "duration": datetime.timedelta(1),
}  # fmt: skip


@st.composite
def _column(draw: st.DrawFn, count: int, label: bool) -> tuple[Any, list[str | None] | None]:
    """A column of one type, and how its values read; None where they cannot be meant."""
    import pyarrow as pa

    if draw(st.integers(0, 4)) == 0:
        odd = {**_NOT_MEANT} if label else {**_NOT_MEANT, "bool": True}
        return pa.array([draw(st.sampled_from(list(odd.values())))] * count), None
    kind = draw(st.sampled_from([kind for kind in _MEANT if label or kind != "bool"]))
    values = draw(st.lists(st.one_of(_MEANT[kind], _MEANT[kind], st.none()), min_size=count, max_size=count))
    types = {"dictionary": pa.string(), "large_string": pa.large_string(), "bool": pa.bool_()}
    array = pa.array(values, types.get(kind) or pa.type_for_alias(kind))
    return (array.dictionary_encode() if kind == "dictionary" else array), [_read_as(value) for value in values]


@st.composite
def parquet(draw: st.DrawFn) -> Made:
    """Columns of the types that may stand for texts and labels, and of some that may not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = draw(st.integers(1, 5))
    (text, texts), (label, labels) = draw(_column(count, label=False)), draw(_column(count, label=True))
    stream = io.BytesIO()
    pq.write_table(pa.table({"label": label, "other": [None] * count, "text": text}), stream)
    rows: Any = list(zip(texts, labels, strict=True)) if texts is not None and labels is not None else "refused"
    return Made(".parquet", stream.getvalue(), rows)


_BAD_VALUES = ["1.0", "-0", "1e3", "NaN", "Infinity", "null", '["a"]', "[]", '{"a": "b"}', '"\\ud800"', '"\\udc00x"']
_BAD_FILES = [
    (".csv", "text,label,text\na,1,b\n"), (".csv", "text,label\n{},1,2\n"), (".csv", "text,label\n{}\n"),
    (".csv", 'text,label\n"{},1\n'), (".csv", 'text,label\n"{}"x,1\n'), (".csv", "text;label\n{};1\n"),
    (".tsv", "text\tlabel\n{}\n"), (".tsv", "text\tlabel\n{}\t1\t\n"), (".tsv", "text\tlabel\tlabel\n{}\t1\t0\n"),
    (".jsonl", '{{"text": "{}", "label": "1", "label": "1"}}\n'), (".jsonl", '{{"text": "{}"}}\n'),
    (".jsonl", '{{"text": "{}", "label": "1"}}\n{{"text": "a"'), (".jsonl", '{{"text": "{}", "label": "1"}}\n["a"]\n'),
    (".json", '{{"data": [{{"text": "{}", "label": "1"}}]}}'), (".json", '[{{"text": "{}", "label": "1"}}'),
    (".json", '{{\n"text": "{}",\n "label": "1"}}'), (".json", '[["{}", "1"]]'), (".csv", ""), (".csv", "text,label\n"),
]  # fmt: skip


@st.composite
def refused(draw: st.DrawFn) -> Made:
    """Files that cannot be meant."""
    word = draw(st.sampled_from(["a", "007", "é", "1.0"]))
    if draw(st.booleans()):
        suffix, text = draw(st.sampled_from(_BAD_FILES))
        content = text.replace("{{", "\x01").replace("}}", "\x02").replace("{}", word)
        return Made(suffix, content.replace("\x01", "{").replace("\x02", "}").encode(), "refused")
    column, value = draw(st.sampled_from(["text", "label"])), draw(st.sampled_from(_BAD_VALUES))
    rows = [f'{{"text": "{word}", "label": "{number}"}}' for number in range(draw(st.integers(1, 4)))]
    other = "label" if column == "text" else "text"
    rows.insert(draw(st.integers(0, len(rows))), f'{{"{other}": "{word}", "{column}": {value}}}')
    return Made(".jsonl", "\n".join(rows).encode(), "refused")


_PIECES = [b'"', b"\n", b",", b"{", b"[" * 9999, b"\0", b"\xff"]


@st.composite
def damaged(draw: st.DrawFn) -> Made:
    """A good file with bytes changed, cut off or put in, or under another suffix."""
    made = draw(st.one_of(delimited(), objects(), parquet()))
    content = bytearray(made.content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        piece = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"\n", b",", b"{", b"[" * 9999, b"\0", b"\xff"]))
        )
        content[place : place + draw(st.integers(0, 3))] = piece
    content = content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content
    suffix = draw(st.sampled_from([made.suffix, ".csv", ".tsv", ".jsonl", ".json", ".parquet"]))
    encoding = draw(st.sampled_from([made.encoding, "utf-8", "latin-1", "utf-32", "gb18030", "utf-7"]))
    return Made(suffix, bytes(content), "either", encoding)
