"""Metrics against the libraries' own, degenerate inputs included; `evaluate` offline; the bootstrap."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from seqeval import metrics as seqeval
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

from hfcompress.data import metrics
from hfcompress.data.entities import find_entities
from hfcompress.data.evaluate_metric import EvaluateMetric
from hfcompress.data.metrics import (
    CLASSIFICATION,
    MASKED,
    OF_TASK,
    REGRESSION,
    SPANS,
    TOKENS,
    bootstrap_differences,
    bootstrap_interval,
    object_array,
)  # fmt: skip
from hfcompress.data.sequence import TextClassification
from hfcompress.utils.errors import HfcompressError

CLASSES, SCORES = sorted(CLASSIFICATION), sorted(REGRESSION)
CLASSIC = {**CLASSIFICATION, **REGRESSION}
ENTITY_SCORES = {"f1": seqeval.f1_score, "precision": seqeval.precision_score, "recall": seqeval.recall_score}
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


# References


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", accuracy_score),
        ("f1", lambda references, answers: f1_score(references, answers, average=kind_of_f1(references))),
        ("matthews_correlation", matthews_corrcoef),
        ("mse", mean_squared_error),
        ("pearson", lambda references, answers: pearsonr(answers, references).statistic),
        ("spearman", lambda references, answers: spearmanr(answers, references).statistic),
    ],
)
def test_a_metric_is_the_library_s(name: str, reference: Any) -> None:
    for predictions, references in (drawn(2), drawn(3), drawn(5)) if name in CLASSIFICATION else (scored(),):
        assert CLASSIC[name](predictions, references) == pytest.approx(reference(references, predictions))


def kind_of_f1(references: Any) -> str:
    """Of two classes it is that of class 1, and of more the plain mean."""
    return "binary" if len(set(references.tolist())) == 2 else "macro"


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("name", [name for name, metric in CLASSIC.items() if getattr(metric, "library", None)])
def test_the_sums_behind_a_bootstrap_give_the_library_s_metric(name: str, classes: int) -> None:
    for seed in range(20):
        predictions, references = drawn(classes, 5 + seed, seed)
        metric: Any = CLASSIC[name]
        assert metric.total(metric.rows(predictions, references).sum(0)) == pytest.approx(
            metric(predictions, references)
        )


def test_correlations_are_of_values_and_of_ranks() -> None:
    predictions, references = scored()
    assert len(set(predictions.tolist())) < len(predictions)  # there are ties
    assert metrics.pearson(-3 * references + 1, references) == pytest.approx(-1)
    assert metrics.spearman(np.exp(references), references) == pytest.approx(1)


# Degenerate inputs


@pytest.mark.parametrize(
    ("name", "reference"),
    [("pearson", lambda x, y: pearsonr(x, y).statistic), ("spearman", lambda x, y: spearmanr(x, y).statistic)],
)
def test_all_draws_of_a_correlation_are_scored_as_each_alone(
    name: str, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    references = np.round(generator.normal(size=40), 1)  # with ties
    predictions = references + generator.normal(size=40)
    monkeypatch.setattr(metrics, "_AT_ONCE", 7 * 40)  # parts that do not divide the number of draws

    found = metrics.resample(metrics.REGRESSION[name], predictions, references, samples=100, seed=5)

    drawn = np.random.default_rng(5)
    draws = [drawn.integers(0, 40, 40) for _ in range(100)]
    assert found == pytest.approx([reference(predictions[d], references[d]) for d in draws], abs=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_draws_without_any_difference_correlate_with_nothing(name: str) -> None:
    found = metrics.resample(metrics.REGRESSION[name], np.array([1.0, 2.0]), np.array([3.0, 4.0]), samples=50)
    assert set(np.round(found, 12)) == {0.0, 1.0}  # half of the draws of two units hold one of them twice


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
    assert (
        CLASSIFICATION["matthews_correlation"](zeros, mixed)
        == CLASSIFICATION["matthews_correlation"](mixed, zeros)
        == 0
    )
    assert CLASSIFICATION["matthews_correlation"](zeros, zeros) == 0
    assert CLASSIFICATION["f1"](zeros, mixed) == CLASSIFICATION["f1"](zeros, zeros) == 0
    assert CLASSIFICATION["accuracy"](zeros, mixed) == 0.5


@pytest.mark.parametrize("classes", [2, 3])
def test_right_and_wrong_answers_reach_the_ends(classes: int) -> None:
    references = np.arange(12) % classes
    assert [CLASSIFICATION[name](references, references) for name in CLASSES] == [pytest.approx(1.0)] * 3
    assert CLASSIFICATION["accuracy"]((references + 1) % classes, references) == 0
    assert CLASSIFICATION["f1"]((references + 1) % classes, references) == 0
    assert CLASSIFICATION["matthews_correlation"]((references + 1) % classes, references) < 0
    assert CLASSIFICATION["matthews_correlation"](1 - np.arange(12) % 2, np.arange(12) % 2) == pytest.approx(-1)


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
        return object_array(predictions), object_array([[words[i], "dog"] for i in generator.integers(0, 5, units)])
    tags = ["O", "B-PER", "I-PER", "B-LOC"]
    sizes = generator.integers(1, 9, units)
    return tuple(object_array([[tags[i] for i in generator.integers(0, 4, n)] for n in sizes]) for _ in range(2))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("task", "name"), EVERY)
def test_evaluate_loads_each_of_our_metrics_without_a_network(task: str, name: str) -> None:
    predictions, references = judged(task)
    found = evaluate.load(metrics.MODULE, f"{task}.{name}", keep_in_memory=True)
    value = found.compute(predictions=predictions.tolist(), references=references.tolist())
    assert value == {name: pytest.approx(OF_TASK[task][name](predictions, references))}


@pytest.mark.usefixtures("offline")
def test_evaluate_combines_our_metrics() -> None:
    predictions, references = drawn(3)
    both = evaluate.combine([evaluate.load(metrics.MODULE, f"text-classification.{name}") for name in CLASSES])
    for start in range(0, 60, 20):
        both.add_batch(predictions=predictions[start : start + 20], references=references[start : start + 20])
    assert both.compute() == {name: pytest.approx(CLASSIFICATION[name](predictions, references)) for name in CLASSES}


def test_evaluate_is_told_the_configurations_of_our_module() -> None:
    with pytest.raises(ValueError, match=r"no metric 'f1'.*regression\.pearson"):
        evaluate.load(metrics.MODULE, "f1")


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A metric of somebody else: the share of wrong answers, and a text beside it."""
    folder = tmp_path / "error_rate"
    folder.mkdir()
    (folder / "error_rate.py").write_text("""import datasets
import evaluate

class ErrorRate(evaluate.Metric):
    def _info(self):
        form = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(form))

    def _compute(self, predictions, references):
        wrong = sum(p != r for p, r in zip(predictions, references))
        return {"error": wrong / len(references), "unit": "share"}
""")
    return folder


def evaluated(module: Any, folder: Path = Path("data"), **options: Any) -> TextClassification:
    metric = EvaluateMetric(evaluate=str(module), **{"key": "error", "greater_is_better": False, **options})
    return TextClassification(dataset=str(folder), text=["text"], metric=metric)


@pytest.mark.usefixtures("offline")
def test_a_task_is_scored_by_a_module_of_evaluate(module: Path) -> None:
    task, (predictions, references) = evaluated(module), drawn(2, 40)
    error = 1 - CLASSIFICATION["accuracy"](predictions, references)
    assert task.score(predictions, references) == pytest.approx(error)
    low, high = task.interval(predictions, references, samples=30)
    assert low < error < high
    assert (task.metric_name, task.greater_is_better) == ("error", False)
    assert task.gain(references, 1 - references, references, samples=5) == 1
    assert task.problems() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": "errors"}, r"no finite number under 'errors' \(it computes error, unit\)"),
        ({"key": "unit"}, "no finite number under 'unit'"),
    ],
)
def test_a_module_must_compute_the_score(module: Path, options: Any, said: str) -> None:
    with pytest.raises(HfcompressError, match=said):
        evaluated(module, **options).score(*drawn(2))


def test_a_module_that_refuses_the_values_is_named(module: Path) -> None:
    with pytest.raises(HfcompressError, match="error_rate failed"):
        evaluated(module).score(object_array([["O"]]), object_array([["O"]]))


def test_a_module_that_is_not_there_is_found_before_training(tmp_path: Path) -> None:
    found = evaluated(tmp_path / "nothing", tmp_path).problems()
    assert ("task", "metric", "evaluate") in [problem.key for problem in found]


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
    assert f1_score(references, predictions, average=None)[1] < 0.25
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
    assert find_entities(tags.split()) == expected


def test_entities_are_counted_whole_and_over_all_sentences() -> None:
    references = object_array([["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "O"], ["O"]])
    predictions = object_array([["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC", "O"], ["O"]])
    # Right: PER 0-1. Predicted: PER 0-1, PER 3, LOC 0-1. There: PER 0-1, LOC 3, LOC 1.
    assert [TOKENS[name](predictions, references) for name in ENTITY_SCORES] == [pytest.approx(1 / 3)] * 3
    assert TOKENS["accuracy"](predictions, references) == pytest.approx(5 / 8)
    nothing = object_array([["O"] * len(tags) for tags in references])
    assert [TOKENS[name](nothing, references) for name in ENTITY_SCORES] == [0, 0, 0]


def test_entities_are_counted_as_seqeval_counts() -> None:
    missed = (
        object_array([["B-PER", "O", "O"]]),
        object_array([["B-PER", "O", "B-LOC"]]),
    )  # precision is not recall
    for predictions, references in (judged("token-classification"), missed):
        for name, score in ENTITY_SCORES.items():
            expected = score(references.tolist(), predictions.tolist())
            assert TOKENS[name](predictions, references) == pytest.approx(expected)


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
    predictions, references = object_array([predicted]), object_array([given])
    assert SPANS["exact_match"](predictions, references) == exact
    assert SPANS["f1"](predictions, references) == pytest.approx(f1)


def test_answers_are_averaged_over_questions() -> None:
    predictions, references = object_array(["dog", "black cat", "x"]), object_array([["dog"], ["cat"], ["y"]])
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
