"""A data file is read as it is spelled, or refused with its row; no column is typed by a guess."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfcompress.data import source
from hfcompress.data.files import data_file
from hfcompress.data.fill_mask import FillMask
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.tokens import TokenClassification
from hfcompress.data.values import LABEL, TEXT
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.places import is_directory
from tests.factories import run_cli

HEAD = {"LABEL_0": 0, "LABEL_1": 1}
NASTY = ["007", "7.0", "1e5", "2.50", "-0", "1_000", "0x10", "9" * 30, "nan", "NA", "null", "None", "True", "false",
         "2024-01-02", "2024-01-02T03:04:05Z", "  padded ", "#hash", "a\u2028b", "x\u0085\x0by", "a\0b",
         'say "hi"']  # fmt: skip
TYPES = {"sentence": TEXT, "label": LABEL}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_in(path: Path, encoding: str = "utf-8") -> list[tuple[Any, Any]]:
    """The texts and labels of a file."""
    rows = data_file(path, encoding).read(TYPES)
    assert data_file(path, encoding).count() == len(rows)
    return list(zip(rows["sentence"][:], rows["label"][:], strict=True))


def refusal(path: Path) -> str:
    def look() -> None:
        data_file(path).columns()
        data_file(path).read(TYPES)

    with pytest.raises(HfcompressError) as caught:
        look()
    return str(caught.value)


def classification(folder: Path, **options: Any) -> TextClassification:
    return TextClassification(type="text-classification", dataset=str(folder), text=["sentence"], **options)


# --- what stands in the file


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_texts_and_labels_are_kept_to_the_letter(tmp_path: Path, suffix: str) -> None:
    path, labels = tmp_path / f"train.{suffix}", ["true", "001", "1.0", "1e3", " 1", "", "١"]
    rows = [(text, labels[i % len(labels)]) for i, text in enumerate(NASTY)]
    objects = [{"sentence": text, "label": label} for text, label in rows]
    if suffix in ("csv", "tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            if suffix == "csv":
                writer = csv.writer(stream)
                writer.writerows([["sentence", "label"], *rows])
            else:
                stream.write("".join(f"{text}\t{label}\n" for text, label in [("sentence", "label"), *rows]))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    else:
        write(path, json.dumps(objects) if suffix == "json" else "\n".join(map(json.dumps, objects)))
    assert rows_in(path) == rows
    assert data_file(path).read(TYPES).features["sentence"] == datasets.Value("string")


def test_numbers_stay_texts_however_late_a_word_comes(tmp_path: Path) -> None:
    count = 25_000  # more rows than are converted together
    lines = "".join(f"{i:05d},{i % 2}\n" for i in range(count))
    path = write(tmp_path / "train.csv", f"sentence,label\n{lines}word,1\n")
    assert rows_in(path) == [(f"{i:05d}", str(i % 2)) for i in range(count)] + [("word", "1")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path: Path, suffix: str, bom: bytes, end: str) -> None:
    lines = {
        "csv": ["sentence,label", "good,1", "", "bad,0", ""],
        "tsv": ["sentence\tlabel", "good\t1", "  ", "bad\t0", ""],
        "jsonl": ['{"sentence": "good", "label": 1}', "", '{"sentence": "bad", "label": 0}', ""],
        "json": ["[", ' {"sentence": "good", "label": 1},', "", ' {"sentence": "bad", "label": 0}', "]"],
    }[suffix]
    assert rows_in(write(tmp_path / f"train.{suffix}", bom + end.join(lines).encode())) == [("good", "1"), ("bad", "0")]


def test_quoted_line_ends_are_one_row_and_counted_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", 'label,sentence\n1,"two\nlines, ""quoted"""\n0,the "film"\n')
    assert rows_in(path) == [('two\nlines, "quoted"', "1"), ('the "film"', "0")]


def test_json_numbers_keep_their_spelling(tmp_path: Path) -> None:
    content = '{"sentence": 12345678901234567890123, "label": -3}\n{"sentence": "x", "label": true}\n'
    path = write(tmp_path / "train.jsonl", content)
    assert rows_in(path) == [("12345678901234567890123", "-3"), ("x", "true")]


def test_other_columns_are_not_looked_at(tmp_path: Path) -> None:
    objects = ['{"sentence": "a", "label": 1, "x": [1], "x": 2}', '{"x": {"y": 1e400}, "label": 0, "sentence": "b"}']
    assert rows_in(write(tmp_path / "train.jsonl", "\n".join(objects))) == [("a", "1"), ("b", "0")]
    assert rows_in(write(tmp_path / "train.csv", "id,sentence,id,label\n1,a,2,1\n")) == [("a", "1")]


def test_fields_of_any_length(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert rows_in(write(tmp_path / "train.csv", f"sentence,label\n{text},1\n")) == [(text, "1")]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "gb18030"])
def test_another_encoding_is_named_in_the_task(tmp_path: Path, encoding: str) -> None:
    content = "sentence,label\ncafé,1\nthé,0\n".encode(encoding)
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.csv", content)
    task = classification(tmp_path, encoding=encoding)
    assert task.problems() == []
    assert task.read("train")["sentence"][:] == ["café", "thé"]


@pytest.mark.parametrize("encoding", ["klingon", "base64", "utf-8\0", "ü"])
def test_an_encoding_that_there_is_not(encoding: str) -> None:
    with pytest.raises(ValueError, match="Python knows no text encoding"):
        classification(Path("data"), encoding=encoding)


# --- what cannot be meant


def row(sentence: str = '"a"', label: str = "1") -> str:
    """A line of a jsonl file."""
    return f'{{"sentence": {sentence}, "label": {label}}}'


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", "sentence,sentence,label\na,b,1\n", "a.csv has 2 columns called 'sentence'\n    rename"),
        ("a.tsv", "sentence\tlabel\tlabel\na\t1\t0\n", "a.tsv has 2 columns called 'label'"),
        ("a.jsonl", '{"sentence": "a", "label": 1, "label": 0}\n', "a.jsonl:1 gives 'label' more than once"),
        ("a.json", '[{"label": 1, "sentence": "a", "label": 0}]', "a.json: entry 0 of the list gives 'label' more"),
        ("a.csv", 'sentence,label\nx,1\n"never closed,1\ny,0\n', "the row at line 3 has misplaced quotes"),
        ("a.csv", 'sentence,label\n"a \\"b\\" c",1\n', "the row at line 2 has misplaced quotes"),
        ("a.csv", "sentence,label\nx,1\na, b,1\n", "the row at line 3 has 3 fields, the header has 2"),
        ("a.csv", 'sentence,label\n"x\ny",1\nz\n', "the row at line 4 has 1 field, the header has 2"),
        ("a.tsv", "sentence\tlabel\nx\n", "the row at line 2 has 1 field"),
        ("a.csv", "sentence;label\na;1\n", "its header is one field, 'sentence;label'"),
        ("a.jsonl", row('["a"]'), "row 0 has ['a'] in column 'sentence', a list where a text is needed (a.jsonl, l"),
        ("a.jsonl", row('{"en": "a"}'), "an object where a text is needed"),
        ("a.jsonl", row("7.0"), "row 0 has 7.0 in column 'sentence', a number that can be spelled"),
        ("a.jsonl", row("-0"), "row 0 has -0 in column 'sentence'"),
        ("a.jsonl", row("true"), "row 0 has True in column 'sentence', a truth value where a text"),
        ("a.jsonl", row(label="1.0"), "row 0 has 1.0 in column 'label', a number with a fraction"),
        ("a.jsonl", row(label="NaN"), "row 0 has NaN in column 'label'"),
        (
            "a.jsonl",
            f"\n{row()}\n{row(label='[0, 1]')}",
            "row 1 has [0, 1] in column 'label', a list where one label is needed (a.jsonl, line 3)",
        ),
        ("a.jsonl", row('"\\ud800"'), "half of a surrogate pair"),
        ("a.jsonl", row(label="1, \"x\": " + "[" * 100_000 + "]" * 100_000), "a.jsonl:1 is nested too deeply"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n{"sentence": "th', "a.jsonl:2 is not JSON"),
        ("a.jsonl", '{"sentence": "a", "label": 1}\n[1, 2]\n', "a.jsonl:2 is not a JSON object: [1, 2]"),
        ("a.json", '[{"sentence": "a", "label": 1}, 2]', "a.json: entry 1 of the list is not a JSON object: 2"),
        ("a.json", '[\n{"sentence": "a", "label": 1},\n\n{"sen\n]', "a.json:4 is not JSON"),
        ("a.json", '{"data":\n [{"sentence": "a"}]}', "not a list of rows\n    take the list out of 'data'"),
        ("a.json", '{"rows": [{"sentence": "a"}]}', "no column 'sentence'\n    take the list out of 'rows'"),
        ("a.csv", gzip.compress(b"sentence\n", mtime=0), "a.csv cannot be read: it is a gzip archive\n    unpack it"),
        ("a.jsonl", '{"sentence": "a"}'.encode("utf-16"), "it is UTF-16 text\n    save it as UTF-8, or say"),
        ("a.csv", "sentence,label\na,1\n".encode("utf-16-le"), "it may be UTF-16"),
        ("a.jsonl", "\n".join([row(), row('"caf\xe9"')]).encode("latin-1"), "line 2 of it is not utf-8 (byte 0xe9"),
        ("a.tsv", b"sentence\tlabel\ncaf\xe9\t1\n", "such as cp1252"),
        ("a.csv", "x" * 300_000, "a.csv has no column 'sentence'"),
        ("a.json", "", "a.json is empty"),
        ("a.csv", "\n\n", "a.csv is empty"),
        ("a.parquet", b"PAR1 and nothing more", "a.parquet is not a parquet file that can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, name: str, content: str | bytes, why: str) -> None:
    said = refusal(write(tmp_path / name, content))
    assert why in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("sentence", "label", "why"),
    [
        ([b"a"], [1], "row 0 has b'a' in column 'sentence', bytes where a text is needed"),
        ([b"a"], [1], "(a.parquet, whose column has the type binary)"),
        (pa.array([0], pa.timestamp("ms")), [1], "a datetime where a text is needed"),
        (pa.array([0], pa.timestamp("ms")), [1], "(a.parquet, whose column has the type timestamp[ms])"),
        ([1.5], [1], "row 0 has 1.5 in column 'sentence', a float where a text is needed"),
        (["a"], [1.0], "row 0 has 1.0 in column 'label', a number with a fraction"),
        (["a"], [decimal.Decimal("1.00")], "a number with a fraction where a label is needed"),
        (["a"], [datetime.date(2024, 1, 2)], "a date where a text is needed"),
        (["a"], [[1, 0]], "a list where one label is needed"),
    ],
)  # fmt: skip
def test_types_that_are_no_text_or_label(tmp_path: Path, sentence: Any, label: Any, why: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"sentence": sentence, "label": label}), path)
    assert why in refusal(path)


def test_types_that_are(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = {"sentence": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array([True, False])}
    pq.write_table(pa.table(table), path)
    assert rows_in(path) == [("a", "true"), ("b", "false")]
    table = {"sentence": pa.array(["a", "b"], pa.large_string()), "label": pa.array([1, 0], pa.int8())}
    pq.write_table(pa.table(table), path)
    assert rows_in(path) == [("a", "1"), ("b", "0")]
    arrays = [pa.array(["a"]), pa.array([1]), pa.array([0])]
    pq.write_table(pa.Table.from_arrays(arrays, ["sentence", "label", "label"]), path)
    assert "a.parquet has 2 columns called 'label'" in refusal(path)


def test_bytes_of_a_parquet_file_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"sentence": broken, "label": [1]}), path)
    assert "Invalid UTF8" in refusal(path)


@pytest.mark.parametrize("value", ["nan", "inf", "1,5", "1e400", "0x10", "1_0", "true", "١"])
def test_a_score_is_a_finite_number_in_plain_spelling(tmp_path: Path, value: str) -> None:
    for split, label in (("train", value), ("dev", "1.5")):
        write(tmp_path / f"{split}.jsonl", json.dumps({"sentence": "a", "label": label}) + "\n")
    task = Regression(type="regression", dataset=str(tmp_path), text=["sentence"], label="label")
    with pytest.raises(HfcompressError, match=r"row 0 has .* in column 'label', which is not a finite number"):
        task.read("train")
    assert task.targets(task.read("dev"), None) == [1.5]


def test_words_and_answers_are_kept_to_the_letter(tmp_path: Path) -> None:
    row = '{"tokens": ["007", "2024-01-02", 5], "ner_tags": [1, "true", "001"]}'
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", row)
    tokens = TokenClassification(type="token-classification", dataset=str(tmp_path))
    (found,) = tokens.read("train")
    assert found == {"tokens": ["007", "2024-01-02", "5"], "ner_tags": ["1", "true", "001"]}
    write(tmp_path / "train.jsonl", '{"tokens": ["a", null], "ner_tags": ["O", "O"]}')
    with pytest.raises(HfcompressError, match=r"row 0 has .* in column 'tokens', a list with an entry that is missing"):
        tokens.read("train")
    answers = '"answers": {"text": ["2024-01-02"], "answer_start": [0], "id": [1.5]}'
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", f'{{"question": "007", "context": "2024-01-02 was", {answers}}}')
    spans = QuestionAnswering(type="question-answering", dataset=str(tmp_path))
    (found,) = spans.read("train")
    assert found["question"] == "007"
    assert spans.targets(spans.read("train"), None) == [(["2024-01-02"], [0])]
    write(tmp_path / "train.jsonl", (tmp_path / "dev.jsonl").read_text().replace("[0]", "[0.0]"))
    with pytest.raises(HfcompressError, match=r"whose answer_start holds 0\.0"):
        spans.read("train")


# --- streams


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "txt", "parquet"])
def test_a_stream_reads_what_a_file_holds(tmp_path: Path, suffix: str) -> None:
    texts = ["007", "1e5", "2024-01-02", "true", "NA", "  x "]
    path = tmp_path / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        objects = [json.dumps({"text": text}) for text in texts]
        lines = {"csv": ["text", *texts], "txt": texts, "jsonl": objects, "json": [f"[{','.join(objects)}]"]}[suffix]
        write(path, "\n".join(lines) + "\n")
    task = FillMask(type="fill-mask", dataset=str(tmp_path), streaming=True, dev_rows=2)
    assert task.problems() == []
    assert task.read("dev")["text"][:] == texts[:2]
    assert [row["text"] for row in task.read("train")] == texts[2:]
    stream = data_file(path).stream({"text": TEXT})
    assert stream.features == datasets.Features({"text": datasets.Value("string")})
    assert [row["text"] for row in pickle.loads(pickle.dumps(stream))] == texts  # noqa: S301  # as a worker gets it


def test_a_stream_refuses_a_row_when_it_comes(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": [1]}\n')
    task = FillMask(type="fill-mask", dataset=str(tmp_path), streaming=True, dev_rows=1)
    with pytest.raises(HfcompressError, match=r"row 2 has \[1\] in column 'text', a list .*\(train.jsonl, line 3\)"):
        list(task.read("train"))


# --- which file


def test_two_files_for_one_split_are_both_named(tmp_path: Path) -> None:
    for name in ("train.csv", "train.tsv", "dev.csv", "validation.csv"):
        write(tmp_path / name, "sentence,label\na,1\nb,0\n")
    task = classification(tmp_path)
    assert "has more than one train file: train.tsv and train.csv" in task.problems()[0].message
    (tmp_path / "train.tsv").unlink()
    assert "has more than one dev file: dev.csv and validation.csv" in task.problems()[0].message
    assert classification(tmp_path, splits={"dev": "validation"}).problems() == []


def test_a_split_that_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    os.mkfifo(tmp_path / "dev.csv")
    task = classification(tmp_path)
    assert "train.csv is not a file that can be read" in task.problems()[0].message
    (tmp_path / "train.csv").rmdir()
    write(tmp_path / "train.csv", "sentence,label\na,1\n")
    assert "dev.csv is not a file that can be read" in task.problems()[0].message


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.csv", "sentence,label\na,1\n")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert "train.csv cannot be read: permission is denied" in refusal(path)


@pytest.mark.parametrize("dataset", ["x" * 300, "./" + "x" * 5000, "~nobody-of-that-name/data", "a\0b", "/a/" * 3000])
def test_a_name_that_can_be_no_directory(dataset: str) -> None:
    assert not source.is_local(dataset)
    assert not is_directory(dataset)
    task = TextClassification(type="text-classification", dataset=dataset, text=["sentence"])
    if dataset.startswith((".", "/", "~")):
        assert "no such data directory" in task.problems()[0].message


def test_the_command_refuses_without_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", '{"sentence": "a", "label": [1, 0]}\n')
    model = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1,
             "intermediate_size": 8, "vocab_size": 9, "max_position_embeddings": 16, "type_vocab_size": 2,
             "architectures": ["BertForSequenceClassification"]}  # fmt: skip
    write(tmp_path / "config.json", json.dumps(model))
    write(tmp_path / "r.yaml", f"name: x\nmodel: {tmp_path}\nstages: [{{kind: finetune}}]\n"
          f"task: {{type: text-classification, dataset: {tmp_path}, text: [sentence], max_length: 8}}\n")  # fmt: skip
    assert run_cli("check", tmp_path / "r.yaml") == 2
    assert "r.yaml:4 task.dataset: row 0 has [1, 0] in column 'label'" in capfd.readouterr().err
