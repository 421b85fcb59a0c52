"""Rows of an exact length, which are made from the judged ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfcompress.measure.rows import Rows, find_length_problems
from tests import factories

CLS, SEP = 101, 102


class _Encoded(list[dict[str, Any]]):
    def with_format(self, _: None) -> _Encoded:
        return self


@pytest.fixture
def rows() -> Rows:
    """A pair of texts, a row without text, and a row of one text, as a tokenizer of BERT encodes them."""
    found = Rows.__new__(Rows)
    found.tokenizer = SimpleNamespace(cls_token_id=CLS, sep_token_id=SEP, bos_token_id=None, eos_token_id=None)
    found.encoded = _Encoded(  # type: ignore[assignment]
        [
            {"input_ids": [CLS, 1, 2, SEP, 3, 4, SEP], "token_type_ids": [0, 0, 0, 0, 1, 1, 1]},
            {"input_ids": [CLS, SEP], "token_type_ids": [0, 0]},
            {"input_ids": [CLS, 7, 8, SEP], "token_type_ids": [0, 0, 0, 0]},
        ]
    )
    return found


@pytest.mark.parametrize(
    ("length", "ids", "types"),
    [
        (7, [CLS, 1, 2, SEP, 3, 4, SEP], [0, 0, 0, 0, 1, 1, 1]),
        (6, [CLS, 1, 2, SEP, 3, SEP], [0, 0, 0, 0, 1, 1]),
        (4, [CLS, 1, 2, SEP], [0, 0, 0, 1]),
        (8, [CLS, 1, 2, SEP, 3, 4, 7, SEP], [0, 0, 0, 0, 1, 1, 1, 1]),
        (11, [CLS, 1, 2, SEP, 3, 4, 7, 8, 1, 2, SEP], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_row_is_cut_or_goes_on_with_the_next_rows(rows: Rows, length: int, ids: list[int], types: list[int]) -> None:
    (batch,) = rows.exact_batches([[0]], length)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["token_type_ids"].tolist() == [types]
    assert batch["attention_mask"].tolist() == [[1] * length]


def test_a_row_without_text_gets_that_of_the_next_rows_and_few_rows_repeat(rows: Rows) -> None:
    (batch,) = rows.exact_batches([[1, 2]], 20)
    assert batch["input_ids"].shape == (2, 20)
    first, second = batch["input_ids"].tolist()
    assert first[:8] == [CLS, 7, 8, 1, 2, SEP, 3, 4]
    assert second[:7] == [CLS, 7, 8, 1, 2, SEP, 3]
    assert first[-1] == second[-1] == SEP


def test_lengths_that_no_row_can_have_are_problems() -> None:
    (problem,) = find_length_problems([16, 64], 32)
    assert problem.key == ("measure", "latency", "lengths", 1)
    assert (problem.message, problem.fix) == (
        "rows of 64 tokens cannot be timed: task.max_length is 32",
        "set it to 32 or less",
    )
    assert find_length_problems([16, 32], 32) == []


def test_check_refuses_them_at_their_line(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli("check", recipe, "--set", "measure.latency.lengths=[8, 17]") == 2
    error = capsys.readouterr().err
    assert "measure.latency.lengths.1: rows of 17 tokens cannot be timed: task.max_length is 16" in error


def test_evaluate_refuses_them_for_each_model(recipe: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["task.max_length=400", "measure.latency.lengths=[300]"]
    arguments = [part for assignment in many for part in ("--set", assignment)]
    assert factories.run_cli("evaluate", teacher, teacher, "--task", recipe, *arguments) == 2
    assert "rows of 300 tokens cannot be timed" in capsys.readouterr().err
