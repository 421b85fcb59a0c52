"""Labels of the data and of a head are matched by name, up to spelling, and never by place where both have names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfcompress.data.labels import make_label_finder, make_name_finder, require_same_labels, sort_labels
from hfcompress.data.sequence import TextClassification
from hfcompress.data.tokens import TokenClassification
from hfcompress.models.artifact import label_ids
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.run.compare import compare
from hfcompress.training.task_heads import label_names
from hfcompress.utils.errors import HfcompressError
from tests import factories


def ids(*names: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


NLI = ids("CONTRADICTION", "NEUTRAL", "ENTAILMENT")


@pytest.mark.parametrize(
    ("head", "names", "values", "expected"),
    [
        # Both have names: names count, whatever their order, case, spaces and hyphens.
        (ids("NEGATIVE", "POSITIVE"), ["positive", "negative"], [0, 1], [1, 0]),
        (NLI, ["entailment", "neutral", "contradiction"], [0, 1, 2, -1, 3], [2, 1, 0, -1, -1]),
        (ids("not-entailment", "Entailment "), ["entailment", "not_entailment"], [0, 1], [1, 0]),
        (ids("LABEL_0", "LABEL_1"), ["LABEL_1", "LABEL_0"], [0, 1], [1, 0]),
        (ids("0", "1"), ["1", "0"], [0, 1], [1, 0]),
        # Names that do not match are not taken by place.
        (ids("NEGATIVE", "POSITIVE"), ["pos", "neg"], [0, 1], [-1, -1]),
        (ids("negative", "positive"), ["negative", "good"], [0, 1], [0, -1]),
        (ids("POS", "neg"), ["Pos", "pos"], [0, 1], [-1, -1]),
        (ids("Pos", "pos"), ["POS", "pos"], [0, 1], [-1, 1]),
        # One side has no names: ids.
        (ids("LABEL_0", "LABEL_1"), ["positive", "negative"], [0, 1, 2], [0, 1, -1]),
        (ids("0", "1"), ["positive", "negative"], [0, 1], [0, 1]),
        (ids("negative", "positive"), ["0", "1"], [0, 1], [0, 1]),
        (ids("LABEL_0", "LABEL_1", "LABEL_2"), ["1", "2", "3"], [0, 1, 2], [0, 1, 2]),
        # Texts: names first, then whole numbers in their usual spelling.
        (ids("negative", "positive"), None, ["0", "1", "2", "-1"], [0, 1, -1, -1]),
        (ids("negative", "positive"), None, ["Positive", " NEGATIVE", "neg"], [1, 0, -1]),
        (ids("LABEL_0", "LABEL_1"), None, ["01", "1.0", "+1", "1e0", "true", "١", "-0", "0x1"], [-1] * 8),
        (ids("LABEL_0", "LABEL_1"), None, ["label 1", "1", "9" * 5000], [1, 1, -1]),
        (ids("false", "true"), None, ["True", "false"], [1, 0]),
        (ids("False", "True"), None, ["true", "false"], [1, 0]),
        (ids("001", "002", "010", "011"), None, ["010", "001", "2", "10"], [2, 0, -1, -1]),
        # A head whose names are numbers: they are names.
        (ids("1", "2", "3"), None, ["1", "3", "0"], [0, 2, -1]),
        (ids("1", "2", "3"), ["0", "1", "2"], [0, 1, 2], [-1, 0, 1]),
    ],
)
def test_a_label_s_id(head: dict[str, int], names: Any, values: list[Any], expected: list[int]) -> None:
    assert list(map(make_label_finder(head, names), values)) == expected


def test_a_name_that_several_labels_are_like_is_none_of_them() -> None:
    find = make_name_finder(ids("B-PER", "b_per", "-", "_", "O"))
    assert [find(name) for name in ("B-PER", "b_per", "B PER", "-", " ", "o")] == [0, 1, None, 2, None, 4]


def test_new_heads_number_labels_by_value_or_by_letters() -> None:
    assert sort_labels(["10", "2", "-1"]) == ["-1", "2", "10"]
    assert sort_labels(["10", "2", "02"]) == ["02", "10", "2"]
    assert sort_labels(["true", "false"]) == ["false", "true"]


def rows(path: Path, labels: list[int], names: list[str]) -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = {"sentence": [f"text {i}" for i in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(table, features=features).to_parquet(path)


def task_on(folder: Path, **options: Any) -> TextClassification:
    return TextClassification(type="text-classification", dataset=str(folder), text=["sentence"], **options)


def said(task: Any, head: dict[str, int] | None) -> str:
    return "\n".join(f"{p.message}\n{p.fix}" for p in task.label_problems(head))


def test_each_split_is_read_by_its_own_names(tmp_path: Path) -> None:
    rows(tmp_path / "train.parquet", [0, 1, 1], ["negative", "positive"])
    rows(tmp_path / "dev.parquet", [0, 1, 1], ["positive", "negative"])
    (tmp_path / "test.csv").write_text("sentence,label\na,positive\nb,0\n")
    task = task_on(tmp_path)
    for head in (ids("negative", "positive"), ids("POSITIVE", "NEGATIVE")):
        sign = 1 if "negative" in head else -1
        assert task.targets(task.read("train"), head) == [0, 1, 1][::sign] if sign > 0 else [1, 0, 0]
        assert task.targets(task.read("dev"), head) == ([1, 0, 0] if sign > 0 else [0, 1, 1])
    assert task.targets(task.read("test"), ids("negative", "positive")) == [1, 0]
    assert task.label_names() == ["negative", "positive"]


def test_names_that_do_not_match_are_told_with_both_lists(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        rows(tmp_path / f"{split}.parquet", [0, 1], ["pos", "neg"])
    told = said(task_on(tmp_path), ids("NEGATIVE", "POSITIVE"))
    assert "row 0 has the label 'pos' in column 'label', outside the model's 2 labels (NEGATIVE, POSITIVE)" in told
    assert "the data names its classes pos, neg" in told
    assert "give each class the same name in the data and in the model" in told
    assert said(task_on(tmp_path), ids("LABEL_0", "LABEL_1")) == ""


def test_a_label_that_several_are_like_is_told(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text("sentence,label\na,POS\nb,neg\n")
    assert "it matches 2 of them\nspell it exactly as one of them" in said(task_on(tmp_path), ids("Pos", "pos", "neg"))


def test_classes_that_train_never_shows_are_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "dev"):
        rows(tmp_path / f"{split}.parquet", [0, 2], ["bad", "mixed", "good"])
    task = task_on(tmp_path)
    assert task.label_problems(None) == []  # a new head keeps the class
    assert "warning: the head's label mixed occurs in no row of the train split" in capfd.readouterr().err
    assert task.label_problems(ids("bad", "mixed", "good")) == []
    assert "mixed" in capfd.readouterr().err
    rows(tmp_path / "train.parquet", [0, 1, 2], ["bad", "mixed", "good"])
    assert task.label_problems(None) == []
    assert "warning" not in capfd.readouterr().err


def test_labels_that_differ_in_spelling_only_are_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.csv").write_text("sentence,label\na,pos\nb,Pos \nc,neg\n")
    assert task_on(tmp_path).label_problems(None) == []
    assert "the labels 'Pos ', 'pos' differ only in spelling" in capfd.readouterr().err


def test_tags_are_matched_by_name_too(tmp_path: Path) -> None:
    feature = datasets.Sequence(datasets.ClassLabel(names=["o", "b_per", "X"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": feature})
    table = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[1, 0], [2]]}
    data = datasets.Dataset.from_dict(table, features=features)
    for split in ("train", "dev"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    task = TokenClassification(type="token-classification", dataset=str(tmp_path))
    assert task.targets(task.read("train").select([0]), ids("O", "B-PER")) == [[1, 0]]
    assert "row 1 has the label 'X' in column 'ner_tags', outside the model's 2 labels (O, B-PER)" in said(
        task, ids("O", "B-PER")
    )


# --- teacher and student


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ids("NEGATIVE", "POSITIVE"), ids("negative", "positive")),
        (ids("LABEL_0", "LABEL_1"), ids("negative", "positive")),
        (ids("negative", "positive"), ids("0", "1")),
    ],
)
def test_a_teacher_that_means_the_same(theirs: dict[str, int], ours: dict[str, int]) -> None:
    require_same_labels("the teacher x", theirs, ours)


@pytest.mark.parametrize(
    ("theirs", "ours", "why"),
    [
        (ids("POSITIVE", "NEGATIVE"), ids("negative", "positive"), "gives 'negative' the id 1, the student 0"),
        (ids("neg", "pos"), ids("negative", "positive"), "has the labels neg, pos, the student negative, positive"),
    ],
)
def test_a_teacher_that_means_something_else(theirs: dict[str, int], ours: dict[str, int], why: str) -> None:
    with pytest.raises(HfcompressError, match=f"the teacher x {why}"):
        require_same_labels("the teacher x", theirs, ours)


# --- heads


class _Named:
    """A task whose data has these labels."""

    head = "sequence"

    def __init__(self, *names: str) -> None:
        self._found = list(names)

    def label_names(self) -> list[str]:
        return self._found


@pytest.mark.parametrize(
    ("own", "found", "expected"),
    [
        (["NEGATIVE", "POSITIVE"], ["positive", "negative"], ["NEGATIVE", "POSITIVE"]),
        (["negative", "positive"], ["0", "1"], ["negative", "positive"]),
        (["1", "2", "3"], ["0", "1", "2"], ["0", "1", "2"]),  # "1" would be two classes
        (["neg", "pos"], ["negative", "positive"], ["negative", "positive"]),
        (["a", "b", "c"], ["a", "b"], ["a", "b"]),
        (["x", "y"], ["false", "true"], ["false", "true"]),
    ],
)
def test_a_new_head_keeps_names_that_mean_the_same(own: list[str], found: list[str], expected: list[str]) -> None:
    assert label_names(_Named(*found), {"id2label": {str(i): name for i, name in enumerate(own)}}, None) == expected


@pytest.mark.parametrize("names", [{"0": "a", "1": "a"}, {"0": "a", "2": "b"}, {"x": "a"}, ["a", "b"]])
def test_a_head_whose_names_are_no_list_of_ids(names: Any) -> None:
    with pytest.raises(HfcompressError, match="the model's id2label"):
        label_ids({"id2label": names})


def test_a_multi_label_model_is_no_model_for_one_label(recipe: Path, teacher: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in teacher.iterdir():
        (model / path.name).symlink_to(path)
    config = json.loads((teacher / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))
    why = "the model's head was trained for multi label classification, the task is text-classification"
    with pytest.raises(HfcompressError, match=why):
        check(load(recipe, [f"model={model}"]))
    with pytest.raises(HfcompressError, match=why):
        compare([str(teacher), str(model)], load(recipe))
    assert check(load(recipe, [f"model={model}", "stages=[{kind: finetune}, {kind: quantize, backend: float16}]"]))


def test_a_teacher_of_several_labels_teaches_nobody(teacher: Path, tmp_path: Path) -> None:
    from hfcompress.distillation.engine import _load_teacher
    from hfcompress.models.artifact import open_artifact

    factories.save(factories.model("bert", problem_type="multi_label_classification"), tmp_path)
    with pytest.raises(HfcompressError, match="the teacher x: the model's head was trained for multi label"):
        _load_teacher(open_artifact(tmp_path, "x"), task_on(tmp_path), needs_logits=True)
