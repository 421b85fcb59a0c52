"""The paired race on dev."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hfcompress.data.sequence import TextClassification
from hfcompress.measure.answers import Answer
from hfcompress.searching.race import list_looks, race
from hfcompress.utils.margin import Margin

ACCURACY = TextClassification.metrics["accuracy"]


def make_answers(rows: int, broken: float, repaired: float, seed: int = 0) -> tuple[Answer, np.ndarray]:
    """A source that is right in 90% of the rows, and a model that breaks and repairs a share of its answers."""
    draw = np.random.default_rng(seed)
    references = draw.integers(0, 2, rows)
    source = np.where(draw.random(rows) < 0.9, references, 1 - references)
    flips = draw.random(rows) < np.where(source == references, broken, repaired)
    return Answer(source, references), np.where(flips, 1 - source, source)


def run(source: Answer, result: np.ndarray, margin: Margin) -> tuple[bool, int, list[int]]:
    asked: list[int] = []

    def ask(numbers: Sequence[int]) -> Answer:
        asked.extend(numbers)
        return Answer(result[list(numbers)], source.references[list(numbers)])

    found = race(source, ask, ACCURACY, margin)
    return found.holds, found.rows, asked


def test_looks_double_and_end_with_all_rows() -> None:
    assert list_looks(4500) == [500, 1000, 2000, 4000, 4500]
    assert list_looks(120) == [120]
    assert list_looks(500) == [500]


def test_a_clear_answer_takes_few_rows_and_no_row_twice() -> None:
    for broken, holds in ((0.0, True), (0.5, False)):
        source, result = make_answers(8000, broken, 0.0)
        found, rows, asked = run(source, result, Margin(0.02, relative=True))
        assert (found, rows) == (holds, 500)
        assert len(asked) == len(set(asked)) == rows


def test_a_close_one_takes_all_rows() -> None:
    source, result = make_answers(4000, 0.02, 0.0)
    _, rows, asked = run(source, result, Margin(0.02, relative=True))
    assert rows == len(set(asked)) == 4000


@pytest.mark.parametrize("margin", [Margin(0.02, relative=True), Margin(0.018, relative=False)])
def test_a_loss_at_the_margin_is_seldom_let_through(margin: Margin) -> None:
    """The level of 5% holds although the race looks several times."""
    passed = sum(run(*make_answers(4000, 0.02 + 0.01 / 0.9, 0.1, seed), margin)[0] for seed in range(200))
    assert passed <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05 * 0.95)
