"""`hfcompress init`: a data file and a model go in, a recipe that `check` finds sound comes out."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from hfcompress.data.files import data_file
from hfcompress.data.profile import Profile, guess_columns
from hfcompress.data.split import split_rows, write_splits
from hfcompress.recipe.loader import load
from hfcompress.recipe.proposal import propose
from hfcompress.utils.errors import HfcompressError
from tests import factories

ROWS = [{"id": f"{n:03}", "sentence": f"film number {n} was {'good' if n % 4 else 'bad'}", "label": str(int(n % 4 > 0))}
        for n in range(200)]  # fmt: skip


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_split_keeps_equal_texts_together_and_classes_in_proportion() -> None:
    texts = [
        f"text {n // 2}" if n % 2 else f"Text  {n // 2}" for n in range(400)
    ]  # each stands twice, spelled otherwise
    classes = [int(n // 2 % 4 == 0) for n in range(400)]

    numbers = split_rows(texts, classes, seed=3)

    assert sorted(row for rows in numbers.values() for row in rows) == list(range(400))
    assert [len(numbers[split]) for split in ("train", "dev", "test")] == [320, 40, 40]
    for rows in numbers.values():
        assert {row // 2 * 2 for row in rows} | {row // 2 * 2 + 1 for row in rows} == set(rows)
        assert Counter(classes[row] for row in rows)[1] / len(rows) == pytest.approx(0.25, abs=0.05)
    assert split_rows(texts, classes, seed=3) == numbers != split_rows(texts, classes, seed=4)


def test_too_few_texts_are_not_split() -> None:
    with pytest.raises(HfcompressError, match="9 different texts, too few"):
        split_rows([f"text {n % 9}" for n in range(90)], [0] * 90, seed=0)


ODD = [{"text": 'a "quoted", text\nof two lines', "label": "01"}, {"text": "é, NaN", "label": "1e3"}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_split_file_holds_its_rows_as_they_were_spelled(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"all{suffix}"
    if suffix == ".csv":
        _write_csv(path, ODD)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ODD), path)
    else:
        spelled = ['{"text": "tab\\t", "label": 7.10}', '{"text":"\u2028","label": 1E3}']
        path.write_text(
            "\n".join(spelled) if suffix == ".jsonl" else f"[{spelled[0]},\n{spelled[1]}]", encoding="utf-8"
        )
    before = data_file(path).samples(9)

    first, second = write_splits(path, {"train": [1], "dev": [0]}, tmp_path)

    assert [data_file(first).samples(9), data_file(second).samples(9)] == [[before[1]], [before[0]]]
    if suffix in (".jsonl", ".json"):
        assert [first.read_text(encoding="utf-8"), second.read_text(encoding="utf-8")] == [
            f"{spelled[1]}\n",
            f"{spelled[0]}\n",
        ]


GUESSES = [
    ([{"id": "1", "sentence": "so good", "label": "1"}, {"id": "2", "sentence": "so bad", "label": "0"}],
     ("text-classification", ("sentence",), "label")),
    ([{"sentence2": "a", "sentence1": "b", "score": "3.5"}, {"sentence2": "a", "sentence1": "b", "score": "1"},
      {"sentence2": "a", "sentence1": "b", "score": "0"}], ("regression", ("sentence1", "sentence2"), "score")),
    ([{"tokens": ["Ada"], "ner_tags": ["B-PER"]}], ("token-classification", ("tokens",), "ner_tags")),
    ([{"context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": [0]}}],
     ("question-answering", ("question", "context"), "answers")),
    ([{"text": "only text"}], ("fill-mask", ("text",), None)),
    ([{"body": f"some longer text {n}", "number": str(n), "team": "ab"[n % 2]} for n in range(20)],
     ("text-classification", ("body",), "team")),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "expected"), GUESSES, ids=[guess[0] for _, guess in GUESSES])
def test_columns_and_task_are_guessed(samples: list[dict[str, Any]], expected: tuple[Any, ...]) -> None:
    found = guess_columns(samples)
    assert (found.type, found.text, found.label) == expected


def test_a_column_that_is_not_there_is_an_error() -> None:
    with pytest.raises(HfcompressError, match="no column 'sentance'") as error:
        guess_columns([{"sentence": "a", "label": "b"}], text=["sentance"])
    assert "sentence" in error.value.problems[0].fix


def test_one_file_becomes_a_sound_recipe_and_three_splits(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    file = _write_csv(tmp_path / "my films.csv", ROWS)
    recipe = tmp_path / "films.yaml"

    status = factories.run_cli("init", "--model", teacher, "--data", file, "--output", recipe)

    assert status == 0
    said = capsys.readouterr().out
    assert "task: text-classification; text: sentence; label: label" in said
    assert "160 in train, 20 in dev, 20 in test" in said
    assert "test: 20 rows can rule out a loss above 19 points of accuracy; 2,562 rows could rule out 1 point" in said
    loaded = load(recipe).recipe
    assert [stage.kind for stage in loaded.stages] == ["quantize"]  # the teacher answers this task already
    assert Path(loaded.task.dataset) == tmp_path / "films-data"
    ids = {
        row["id"]
        for split in ("train", "dev", "test")
        for row in data_file(tmp_path / f"films-data/{split}.csv").samples(999)
    }
    assert ids == {row["id"] for row in ROWS}
    assert factories.run_cli("check", recipe) == 0


def test_what_is_there_is_left_as_it_is(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    file, recipe = _write_csv(tmp_path / "films.csv", ROWS), tmp_path / "films.yaml"
    recipe.write_text("mine")
    assert factories.run_cli("init", "--model", teacher, "--data", file, "--output", recipe) == 2
    assert recipe.read_text() == "mine"
    assert "left as it is" in capsys.readouterr().err


def test_a_proposal_that_fails_leaves_no_directory(teacher: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": "one class"} for row in ROWS]
    with pytest.raises(HfcompressError, match="one class only"):
        propose(
            str(teacher), str(_write_csv(tmp_path / "films.csv", rows)), tmp_path / "films.yaml", ["sentence"], "label"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["films.csv"]


def test_a_directory_without_dev_gets_one_from_train_and_keeps_its_test(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    _write_csv(folder / "train.csv", ROWS)
    _write_csv(folder / "test.csv", ROWS[:10])

    made = propose(str(teacher), str(folder), tmp_path / "films.yaml")

    assert made.split == tmp_path / "films-data"
    assert dict(made.profile.rows) == {"train": 180, "dev": 20, "test": 10}
    assert made.profile.leaks["dev"] == 0
    assert made.profile.leaks["test"] > 0
    assert any("in test have a text of train" in warning for warning in made.profile.warnings())


@pytest.mark.parametrize(
    ("target", "kinds"),
    [(3.0, ["finetune", "quantize"]), (6.0, ["finetune", "prune", "quantize"]),
     (20.0, ["finetune", "distill", "prune", "quantize"])],
)  # fmt: skip
def test_a_higher_target_takes_more_stages(target: float, kinds: list[str], teacher: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": "abc"[int(row["id"]) % 3]} for row in ROWS]  # not the teacher's classes
    made = propose(str(teacher), str(_write_csv(tmp_path / "f.csv", rows)), tmp_path / "f.yaml", target_speedup=target)
    assert [stage.kind for stage in load(made.path).recipe.stages] == kinds


def test_a_rare_class_changes_the_metric(teacher: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": str(int(int(row["id"]) % 20 == 0))} for row in ROWS]
    made = propose(str(teacher), str(_write_csv(tmp_path / "f.csv", rows)), tmp_path / "f.yaml")
    assert load(made.path).recipe.task.metric == "matthews_correlation"
    assert "matthews_correlation  # unlike accuracy" in made.path.read_text(encoding="utf-8")
    assert made.profile.rare_classes == ["1"]


def test_lists_of_words_make_a_token_task(teacher: Path, tmp_path: Path) -> None:
    lines = [{"tokens": ["film", "number", str(n)], "ner_tags": ["O", "O", "B-N"]} for n in range(60)]
    file = tmp_path / "ner.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = propose(str(teacher), str(file), tmp_path / "ner.yaml")
    assert made.columns.type == "token-classification"
    assert [stage.kind for stage in load(made.path).recipe.stages] == ["finetune", "quantize"]


def test_a_text_that_stands_in_two_splits_is_told(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split, first, last in (("train", 0, 120), ("dev", 116, 160), ("test", 159, 200)):
        _write_csv(folder / f"{split}.csv", ROWS[first:last])

    assert factories.run_cli("init", "--model", teacher, "--data", folder, "--output", tmp_path / "r.yaml") == 0

    said = " ".join(capsys.readouterr().err.split())
    assert "4 rows of 44 in dev have a text of train" in said
    assert "1 row of 41 in test has a text of dev" in said
    assert "1 row of 41 in test has a text of dev" in " ".join((tmp_path / "r.yaml").read_text().split())


def test_repeated_and_contradicting_texts_are_told() -> None:
    warnings = Profile({"train": 10, "dev": 5}, {"a": 9, "b": 1}, (), {"dev": 2}, 3, 1).warnings()
    assert ["leave them out" in warnings[0], "more than one label" in warnings[1], "repeat" in warnings[2]] == [
        True
    ] * 3


def _write_text(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


BAD_FILES = [
    ("text;label\ngood;1\nbad;0\n", "separated by ';'", "commas"),
    ("a good film,b\na bad film,a\na long film,b\na dull film,a\n", "the first line looks like a row", "column names"),
    ("text,label\n" + "".join(f"film {n},x{n}\n" for n in range(40)), "40 different values in 40 rows", "--label"),
]


@pytest.mark.parametrize(("text", "message", "fix"), BAD_FILES, ids=["semicolons", "no header", "no classes"])
def test_a_file_that_was_read_wrongly_is_refused(text: str, message: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(HfcompressError) as error:
        propose("nowhere", str(_write_text(tmp_path / "f.csv", text)), tmp_path / "f.yaml")
    assert message in error.value.problems[0].message
    assert fix in error.value.problems[0].fix
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]


def test_a_nested_object_is_no_list_of_rows(tmp_path: Path) -> None:
    nested = {"version": "1", "data": [{"title": "t", "paragraphs": []}]}
    with pytest.raises(HfcompressError, match="one object with a list 'data'"):
        propose("nowhere", str(_write_text(tmp_path / "f.json", json.dumps(nested))), tmp_path / "f.yaml")


def test_a_type_of_task_is_spelled_as_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(HfcompressError, match="no type of task 'classification'") as error:
        propose("nowhere", "f.csv", tmp_path / "f.yaml", type="classification")
    assert "text-classification" in error.value.problems[0].fix


def test_rows_without_text_or_label_stand_in_no_split(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [
        {**row, "label": ""} if n < 7 else {**row, "sentence": " "} if n < 10 else row for n, row in enumerate(ROWS)
    ]
    file = _write_csv(tmp_path / "f.csv", rows)

    assert factories.run_cli("init", "--model", teacher, "--data", file, "--output", tmp_path / "f.yaml") == 0

    assert "left out: 10 rows without text or label" in capsys.readouterr().out
    found = [
        row for split in ("train", "dev", "test") for row in data_file(tmp_path / f"f-data/{split}.csv").samples(999)
    ]
    assert {row["id"] for row in found} == {row["id"] for row in ROWS[10:]}


def test_a_split_keeps_each_class_in_train() -> None:
    classes = ["often"] * 90 + [f"once {n}" for n in range(10)]
    for seed in range(5):
        numbers = split_rows([f"text {n}" for n in range(100)], classes, seed)
        assert {classes[row] for row in numbers["train"]} == set(classes)
        assert sorted(row for rows in numbers.values() for row in rows) == list(range(100))


def test_a_file_in_another_encoding_becomes_utf_8(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    rows = "".join(f"film \xe9t\xe9 {n},{'good' if n % 3 else 'bad'}\n" for n in range(60))
    file = _write_text(tmp_path / "f.csv", f"text,label\n{rows}", "cp1252")
    command = ("init", "--model", teacher, "--data", file, "--output", tmp_path / "f.yaml")
    assert factories.run_cli(*command) == 2
    assert "--encoding" in capsys.readouterr().err
    assert factories.run_cli(*command, "--encoding", "cp1252") == 0
    assert "\xe9t\xe9" in (tmp_path / "f-data" / "train.csv").read_text(encoding="utf-8")
    assert load(tmp_path / "f.yaml").recipe.task.encoding == "utf-8"


def test_a_recipe_names_the_schema_that_lies_beside_it(teacher: Path, tmp_path: Path) -> None:
    _write_text(tmp_path / "recipe.schema.json", "{}")
    made = propose(str(teacher), str(_write_csv(tmp_path / "f.csv", ROWS)), tmp_path / "f.yaml")
    text = made.path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n# quantize, to make")
    assert load(made.path).headline.startswith("quantize, to make")


def test_short_contexts_of_questions_get_a_short_stride(teacher: Path, tmp_path: Path) -> None:
    made = propose(str(teacher), str(factories.write_questions(tmp_path / "qa")), tmp_path / "qa.yaml")
    task: Any = load(made.path).recipe.task
    assert (task.type, task.label) == ("question-answering", "answers")
    assert task.stride == task.max_length // 4
    assert "metric: f1\n" in made.path.read_text(encoding="utf-8")


def test_three_columns_are_no_text(tmp_path: Path) -> None:
    file = _write_csv(tmp_path / "f.csv", ROWS)
    with pytest.raises(HfcompressError, match="3 columns of text"):
        propose("nowhere", str(file), tmp_path / "f.yaml", ["id", "sentence", "label"])
