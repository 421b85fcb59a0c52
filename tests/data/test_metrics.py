"""Metrics against literal references, degenerate inputs included; `evaluate` offline; the bootstrap."""

from __future__ import annotations

import math
import socket
from typing import Any

import numpy as np
import pytest

from hfcompress.data import metrics
from hfcompress.data.entities import entities
from hfcompress.data.metrics import (
    CLASSIFICATION,
    MASKED,
    OF_TASK,
    REGRESSION,
    SPANS,
    TOKENS,
    bootstrap_differences,
    bootstrap_interval,
    metric,
    objects,
)  # fmt: skip

CLASSES, SCORES = sorted(CLASSIFICATION), sorted(REGRESSION)
CLASSIC = {**CLASSIFICATION, **REGRESSION}
EVERY = [(task, name) for task, names in OF_TASK.items() for name in names]


def drawn(classes: int, rows: int = 60, seed: int = 0) -> tuple[Any, Any]:
    """Predictions that agree with their references more often than chance."""
    generator = np.random.default_rng(seed)
    references = generator.integers(0, classes, rows)
    wrong = generator.integers(0, classes, rows)
    return np.where(generator.random(rows) < 0.6, references, wrong), references


def scored(rows: int = 60, seed: int = 0) -> tuple[Any, Any]:
    """Scores with noise, rounded so that there are ties."""
    generator = np.random.default_rng(seed)
    references = generator.normal(size=rows).round(1)
    return (references + generator.normal(size=rows)).round(1), references


# Literal references


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_accuracy_counts(classes: int) -> None:
    predictions, references = drawn(classes)
    hits = [p == r for p, r in zip(predictions.tolist(), references.tolist(), strict=True)]
    assert CLASSIFICATION["accuracy"](predictions, references) == pytest.approx(hits.count(True) / len(hits))


def literal_f1(predictions: list[int], references: list[int], label: int) -> float:
    pairs = list(zip(predictions, references, strict=True))
    hits = sum(p == r == label for p, r in pairs)
    precision = hits / max(sum(p == label for p, _ in pairs), 1)
    recall = hits / max(sum(r == label for _, r in pairs), 1)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def test_f1_of_two_classes_is_that_of_class_1() -> None:
    predictions, references = drawn(2)
    expected = literal_f1(predictions.tolist(), references.tolist(), 1)
    assert CLASSIFICATION["f1"](predictions, references) == pytest.approx(expected)
    assert CLASSIFICATION["f1"](1 - predictions, 1 - references) != pytest.approx(expected)


def test_f1_of_more_classes_is_the_plain_mean_over_them() -> None:
    predictions, references = drawn(4)
    expected = [literal_f1(predictions.tolist(), references.tolist(), label) for label in range(4)]
    assert CLASSIFICATION["f1"](predictions, references) == pytest.approx(sum(expected) / 4)


def test_matthews_correlation_of_two_classes() -> None:
    predictions, references = drawn(2)
    pairs = list(zip(predictions.tolist(), references.tolist(), strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews_correlation(predictions, references) == pytest.approx(expected)


def test_matthews_correlation_of_more_classes_is_that_of_the_one_hot_rows() -> None:
    """Gorodkin 2004: `R_K = cov(X, Y) / √(cov(X, X) cov(Y, Y))`, covariances summed over the classes' columns."""
    predictions, references = drawn(4)
    x, y = np.eye(4)[predictions], np.eye(4)[references]

    def cov(a: Any, b: Any) -> float:
        return sum(float(np.mean((a[:, k] - a[:, k].mean()) * (b[:, k] - b[:, k].mean()))) for k in range(4))

    expected = cov(x, y) / math.sqrt(cov(x, x) * cov(y, y))
    assert metrics.matthews_correlation(predictions, references) == pytest.approx(expected)


def literal_pearson(x: list[float], y: list[float]) -> float:
    a, b = (sum(values) / len(values) for values in (x, y))
    products = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    return products / math.sqrt(sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y))


def literal_ranks(values: list[float]) -> list[float]:
    """A tie's rank is the mean of the places that it takes."""
    return [sum(w < v for w in values) + (values.count(v) + 1) / 2 for v in values]


def test_pearson() -> None:
    predictions, references = scored()
    expected = literal_pearson(predictions.tolist(), references.tolist())
    assert metrics.pearson(predictions, references) == pytest.approx(expected)
    assert metrics.pearson(-3 * references + 1, references) == pytest.approx(-1)


def test_spearman_with_ties() -> None:
    predictions, references = scored()
    assert len(set(predictions.tolist())) < len(predictions)
    expected = literal_pearson(literal_ranks(predictions.tolist()), literal_ranks(references.tolist()))
    assert metrics.spearman(predictions, references) == pytest.approx(expected)
    assert metrics.spearman(np.exp(references), references) == pytest.approx(1)


def test_mean_squared_error() -> None:
    predictions, references = scored()
    expected = sum((p - r) ** 2 for p, r in zip(predictions.tolist(), references.tolist(), strict=True)) / 60
    assert REGRESSION["mse"](predictions, references) == pytest.approx(expected)
    assert REGRESSION["mse"](np.array([0, 3]), np.array([1, 1])) == 2.5


# Degenerate inputs


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 49])
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_answer_correlates_with_nothing(name: str, rows: int) -> None:
    varied = np.arange(rows, dtype=float)
    for value in (0.0, 0.1, 1 / 3, 1e6 + 0.1):
        for kind in (np.float64, np.float32):
            assert REGRESSION[name](np.full(rows, value, dtype=kind), varied) == 0.0
            assert REGRESSION[name](varied, np.full(rows, value, dtype=kind)) == 0.0


def test_one_predicted_class_scores_nothing_where_that_is_undefined() -> None:
    zeros, mixed = np.zeros(6, dtype=int), np.array([0, 1, 0, 1, 1, 0])
    assert metrics.matthews_correlation(zeros, mixed) == metrics.matthews_correlation(mixed, zeros) == 0
    assert metrics.matthews_correlation(zeros, zeros) == 0
    assert CLASSIFICATION["f1"](zeros, mixed) == CLASSIFICATION["f1"](zeros, zeros) == 0
    assert CLASSIFICATION["accuracy"](zeros, mixed) == 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_right_and_wrong_answers_reach_the_ends(classes: int) -> None:
    references = np.arange(12) % classes
    assert [CLASSIFICATION[name](references, references) for name in CLASSES] == [pytest.approx(1.0)] * 3
    assert CLASSIFICATION["accuracy"]((references + 1) % classes, references) == 0
    assert CLASSIFICATION["f1"]((references + 1) % classes, references) == 0
    assert metrics.matthews_correlation((references + 1) % classes, references) < 0
    assert metrics.matthews_correlation(1 - np.arange(12) % 2, np.arange(12) % 2) == pytest.approx(-1)


# evaluate


def judged(task: str, units: int = 60) -> tuple[Any, Any]:
    """Predictions and references as the task's `judge` gives them, some of them right."""
    generator = np.random.default_rng(0)
    if task in ("text-classification", "regression"):
        return drawn(3, units) if task == "text-classification" else scored(units)
    if task == "fill-mask":
        asked = generator.integers(1, 9, units)
        return np.stack([generator.integers(0, asked + 1), generator.exponential(asked)], 1), asked
    if task == "question-answering":
        words = ["the cat", "a dog", "cat dog", "", "seven"]
        predictions = [words[i] for i in generator.integers(0, 5, units)]
        return objects(predictions), objects([[words[i], "dog"] for i in generator.integers(0, 5, units)])
    tags = ["O", "B-PER", "I-PER", "B-LOC"]
    sizes = generator.integers(1, 9, units)
    return tuple(objects([[tags[i] for i in generator.integers(0, 4, n)] for n in sizes]) for _ in range(2))


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_a_metric_is_one_of_evaluate_s_and_needs_no_network(
    task: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    predictions, references = judged(task)
    found = metric(name, task)
    assert isinstance(found, evaluate.Metric)
    value = found.compute(predictions=predictions, references=references)
    assert value == {name: pytest.approx(OF_TASK[task][name](predictions, references))}
    assert found.compute(predictions=predictions.tolist(), references=references.tolist()) == value


def test_a_metric_can_be_filled_batch_by_batch() -> None:
    predictions, references = drawn(3)
    accuracy = metric("accuracy")
    for start in range(0, 60, 20):
        accuracy.add_batch(predictions=predictions[start : start + 20], references=references[start : start + 20])
    assert accuracy.compute()["accuracy"] == pytest.approx(CLASSIFICATION["accuracy"](predictions, references))


# Bootstrap


@pytest.mark.parametrize("name", [*CLASSES, *SCORES])
def test_the_interval_contains_the_value_and_shrinks_with_more_rows(name: str) -> None:
    widths = []
    for rows in (50, 800):
        predictions, references = drawn(3, rows) if name in CLASSIFICATION else scored(rows)
        low, high = bootstrap_interval(CLASSIC[name], predictions, references, samples=200)
        assert low < CLASSIC[name](predictions, references) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(("task", "name"), EVERY)
def test_an_interval_is_that_of_the_metric_of_each_draw(task: str, name: str) -> None:
    """Adding what was counted of each unit once must be the metric of the drawn units, whatever is drawn."""
    function, (predictions, references) = OF_TASK[task][name], judged(task)
    generator = np.random.default_rng(7)
    draws = [generator.integers(0, 60, 60) for _ in range(80)]
    expected = np.quantile([function(predictions[draw], references[draw]) for draw in draws], [0.025, 0.975])
    assert bootstrap_interval(function, predictions, references, 80, seed=7) == pytest.approx(tuple(expected))


def test_the_same_seed_draws_the_same_rows() -> None:
    predictions, references = drawn(2)
    first, again, other = (
        bootstrap_interval(CLASSIFICATION["f1"], predictions, references, 100, seed) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_the_interval_of_a_share_is_about_the_normal_one() -> None:
    predictions, references = drawn(2, 400)
    share = CLASSIFICATION["accuracy"](predictions, references)
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert bootstrap_interval(CLASSIFICATION["accuracy"], predictions, references, 2000) == pytest.approx(
        (share - half, share + half), abs=half / 5
    )


def test_a_perfect_model_has_no_spread() -> None:
    _, references = drawn(2)
    assert bootstrap_interval(CLASSIFICATION["accuracy"], references, references, 50) == (1.0, 1.0)


def test_a_class_that_a_draw_misses_does_not_change_which_f1_is_meant() -> None:
    """With one row of a third class many draws hold classes 0 and 1 alone: the average must stay the macro one."""
    references = np.array([0] * 30 + [1] * 9 + [2])
    predictions = references.copy()
    predictions[30:38] = 0
    assert literal_f1(predictions.tolist(), references.tolist(), 1) < 0.25
    low, _ = bootstrap_interval(CLASSIFICATION["f1"], predictions, references, 500)
    assert low > 0.25


# Entities


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O", {("PER", 1, 2)}),
        ("B-PER", {("PER", 0, 0)}),
        ("O O", set()),
        ("", set()),
        ("O I-PER I-PER", {("PER", 1, 2)}),  # an entity may begin with I-
        ("B-PER I-LOC", {("PER", 0, 0), ("LOC", 1, 1)}),  # the type changes
        ("I-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("B-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),  # neighbours
        ("I-PER B-PER I-PER", {("PER", 0, 0), ("PER", 1, 2)}),
        ("B-PER O I-PER", {("PER", 0, 0), ("PER", 2, 2)}),
        ("B-A I-A I-A B-B", {("A", 0, 2), ("B", 3, 3)}),
        ("S-PER S-PER B-LOC E-LOC I-LOC", {("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 3), ("LOC", 4, 4)}),
        ("B-per-son I-per-son", {("per-son", 0, 1)}),
        ("B I O I", {("", 0, 1), ("", 3, 3)}),  # chunks without a type
        ("PER PER O LOC", {("PER", 0, 1), ("LOC", 3, 3)}),  # types without a prefix
    ],
)
def test_entities_are_those_that_conlleval_reads(tags: str, expected: set[Any]) -> None:
    assert entities(tags.split()) == expected


def test_entities_are_counted_whole_and_over_all_sentences() -> None:
    references = objects([["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O"], ["O"]])
    predictions = objects([["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "O"], ["O"]])
    # Right: PER 0-1. Predicted: PER 0-1, PER 3, LOC 0-1. There: PER 0-1, LOC 3, LOC 1.
    assert TOKENS["precision"](predictions, references) == pytest.approx(1 / 3)
    assert TOKENS["recall"](predictions, references) == pytest.approx(1 / 3)
    assert TOKENS["f1"](predictions, references) == pytest.approx(1 / 3)
    assert TOKENS["accuracy"](predictions, references) == pytest.approx(5 / 8)
    assert TOKENS["f1"](references, references) == 1
    nothing = objects([["O"] * len(tags) for tags in references])
    assert [TOKENS[name](nothing, references) for name in ("f1", "precision", "recall")] == [0, 0, 0]


def test_precision_is_of_what_is_predicted_and_recall_of_what_is_there() -> None:
    references, predictions = objects([["B-PER", "O", "B-LOC"]]), objects([["B-PER", "O", "O"]])
    assert TOKENS["precision"](predictions, references) == 1
    assert TOKENS["recall"](predictions, references) == 0.5
    assert TOKENS["f1"](predictions, references) == pytest.approx(2 / 3)


# Answers


@pytest.mark.parametrize(
    ("predicted", "given", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("an  apple, a day", ["Apple day."], 1, 1),
        ("black cat", ["the cat"], 0, 2 / 3),  # 1 of 2 words right, 1 of 1 found
        ("cat cat", ["cat"], 0, 2 / 3),  # a word is found once
        ("dog", ["cat", "black dog", "dog"], 1, 1),  # the nearest counts
        ("dog", ["cat", "black dog"], 0, 2 / 3),
        ("theory", ["ory"], 0, 0),  # an article is a word
        ("", [""], 1, 1),  # rightly no answer
        ("dog", [""], 0, 0),
        ("", ["dog"], 0, 0),
        ("dog", ["cat"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_does(predicted: str, given: list[str], exact: float, f1: float) -> None:
    predictions, references = objects([predicted]), objects([given])
    assert SPANS["exact_match"](predictions, references) == exact
    assert SPANS["f1"](predictions, references) == pytest.approx(f1)


def test_answers_are_averaged_over_questions() -> None:
    predictions, references = objects(["dog", "black cat", "x"]), objects([["dog"], ["cat"], ["y"]])
    assert SPANS["exact_match"](predictions, references) == pytest.approx(1 / 3)
    assert SPANS["f1"](predictions, references) == pytest.approx((1 + 2 / 3) / 3)


# Masked tokens


def test_masked_tokens_are_averaged_over_tokens_not_blocks() -> None:
    predictions, references = np.array([[1, 2.0], [3, 4.0], [0, 0.0]]), np.array([1, 9, 0])
    assert MASKED["accuracy"](predictions, references) == pytest.approx(4 / 10)
    assert MASKED["perplexity"](predictions, references) == pytest.approx(math.exp(6 / 10))
    nothing = np.zeros((2, 2)), np.zeros(2)
    assert (MASKED["accuracy"](*nothing), MASKED["perplexity"](*nothing)) == (0, 1)
    assert math.isfinite(MASKED["perplexity"](np.array([[0, 1e6]]), np.ones(1)))


def test_a_paired_bootstrap_draws_the_same_units_for_both() -> None:
    draw = np.random.default_rng(3)
    references = draw.integers(0, 2, 80)
    one, other = np.where(draw.random(80) < 0.8, references, 1 - references), draw.integers(0, 2, 80)
    accuracy = CLASSIFICATION["accuracy"]
    found = bootstrap_differences(accuracy, one, other, references, 50, seed=7)
    generator = np.random.default_rng(7)
    for value in found:
        units = generator.integers(0, 80, 80)
        assert value == pytest.approx(
            (one[units] == references[units]).mean() - (other[units] == references[units]).mean()
        )


@pytest.mark.parametrize("name", ["f1", "matthews_correlation"])
def test_a_paired_bootstrap_of_any_metric(name: str) -> None:
    references = np.array([0, 1, 0, 1, 1, 0, 0, 1] * 4)
    found = bootstrap_differences(CLASSIFICATION[name], references, 1 - references, references, 20)
    assert found.shape == (20,)
    assert (found > 0).all()
