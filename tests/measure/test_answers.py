"""The answers of several models are put side by side in the order of the data, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hfcompress.data.metrics import object_array
from hfcompress.measure.answers import Answer, Answers, align, read_answers, write_answers
from hfcompress.measure.quality import _restore_order

REFERENCES = np.array([0, 1, 1, 0, 2])
LOGITS = np.array([[3, 1, 0], [0, 2, 1], [2, 1, 0], [1, 0, 0], [0, 0, 4]], dtype="float32")
SOURCE = Answer(LOGITS.argmax(1), REFERENCES, LOGITS, np.array([4, 5, 6, 7, 8]))


def test_outputs_get_the_order_of_the_data() -> None:
    lengths = np.array([3, 1, 2])
    order = np.argsort(lengths, kind="stable")
    rows = np.array([[30], [10], [20]])
    tokens = np.array([[31], [32], [33], [11], [21], [22]])
    read = np.concatenate([tokens[3:4], tokens[4:6], tokens[:3]])

    assert np.array_equal(_restore_order(rows[order], order, lengths, by_token=False), rows)
    assert np.array_equal(_restore_order(read, order, lengths, by_token=True), tokens)


def test_classes_that_another_model_numbers_otherwise_become_the_source_s() -> None:
    ids = np.array([2, 0, 1])  # the source's class 0 is the other's class 2
    other = Answer(ids[LOGITS.argmax(1)], ids[REFERENCES], LOGITS[:, np.argsort(ids)], SOURCE.lengths)

    (found,) = align([SOURCE, other]).others

    assert found is not None
    assert np.array_equal(found.predictions, SOURCE.predictions)
    assert np.array_equal(found.references, REFERENCES)
    assert np.array_equal(found.logits, LOGITS)


def test_a_class_without_rows_keeps_its_number() -> None:
    references = np.array([0, 1, 0, 1, 0])
    source = Answer(np.array([0, 1, 2, 1, 0]), references, LOGITS)
    (found,) = align([source, source]).others
    assert found is not None
    assert np.array_equal(found.predictions, source.predictions)


@pytest.mark.parametrize(
    "references", [np.array([0, 1, 1, 0]), np.array([0, 1, 1, 1, 2]), np.array([0, 0, 0, 0, 2])],
    ids=["fewer", "one class of the source as two", "two classes of the source as one"],
)  # fmt: skip
def test_other_units_or_classes_are_not_compared(references: np.ndarray) -> None:
    other = Answer(references, references, np.zeros((len(references), 3)))
    assert align([SOURCE, other]).others == [None]


def test_blocks_with_other_masks_are_not_compared() -> None:
    source = Answer(np.zeros((2, 2)), np.array([3.0, 4.0]))
    assert align([source, Answer(np.zeros((2, 2)), np.array([3.0, 5.0]))]).others == [None]


KINDS = {
    "classes": SOURCE,
    "scores": Answer(np.array([0.5, 1.0]), np.array([0.0, 1.0])),
    "tags": Answer(object_array([["O", "B-A"], ["O"]]), object_array([["O", "O"], ["B-A"]]), lengths=np.array([4, 3])),
    "spans": Answer(object_array(["a", ""]), object_array([["a", "b"], []])),
    "masks": Answer(np.array([[1.0, 2.5], [0.0, 7.0]]), np.array([3.0, 2.0])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_comes_back(kind: str, tmp_path: Path) -> None:
    answer, stages = KINDS[kind], ["source", "01-quantize", "elsewhere"]
    write_answers(Answers(answer, [answer, None]), stages, tmp_path / "predictions.parquet")

    found = read_answers(tmp_path / "predictions.parquet", stages)

    assert found is not None
    assert found.others[1] is None
    for again in (found.source, found.others[0]):
        assert again is not None
        for name, value in vars(answer).items():
            kept = getattr(again, name)
            assert (kept is None) == (value is None), name
            assert value is None or (kept.tolist() == value.tolist() and kept.dtype == value.dtype), name


@pytest.mark.parametrize("stages", [["source", "02-prune", "elsewhere"], ["source", "01-quantize"]])
def test_answers_of_other_models_are_not_taken(stages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    write_answers(Answers(SOURCE, [SOURCE, SOURCE]), ["source", "01-quantize", "elsewhere"], path)
    assert read_answers(path, stages) is None
    path.write_bytes(b"torn")
    assert read_answers(path, ["source", "01-quantize", "elsewhere"]) is None
    assert read_answers(tmp_path / "none.parquet", stages) is None
