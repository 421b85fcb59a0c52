"""Metrics of whole arrays whose first axis is the judged unit: a row, a sentence, a question, a block of text.

Most are formulas of sums over units, so that a bootstrap looks at each unit once and then only adds. `metric(name)`
wraps one as an `evaluate.Metric`, which needs no download: the arithmetic is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from hfcompress.data import entities, squad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Metric = Callable[["Array", "Array"], float]


@dataclass(frozen=True)
class RowMetric:
    """A metric that is a formula of sums over units.

    Attributes:
        says: What it measures, in a line.
        rows: `(units, k)` numbers to add, of predictions and references.
        total: The metric of their `(k,)` sums.
    """

    says: str
    rows: Callable[[Array, Array], Array]
    total: Callable[[Array], float]

    def __call__(self, predictions: Array, references: Array) -> float:
        return self.total(self.rows(predictions, references).sum(0))


def share(part: float, whole: float) -> float:
    """`part / whole`, 0 where there is no whole."""
    return float(part / whole) if whole else 0.0


def balance(hits: float, predicted: float, there: float) -> float:
    """F1 of counts: the harmonic mean of `hits / predicted` and `hits / there`."""
    return share(2 * hits, predicted + there)


def _hits(predictions: Array, references: Array) -> Array:
    import numpy as np

    hits = predictions == references
    return np.stack([hits, np.ones_like(hits)], axis=1).astype(float)


def _class_counts(predictions: Array, references: Array) -> Array:
    """Hits, predictions and references of class 1 where there are two classes, of each class where there are more."""
    import numpy as np

    present = np.union1d(predictions, references)
    classes = present if present.max() > 1 else np.ones(1)
    predicted, there = predictions[:, None] == classes, references[:, None] == classes
    return np.stack([predicted & there, predicted, there], axis=2).reshape(len(references), -1).astype(float)


def _mean_f1(sums: Array) -> float:
    """The mean over the classes that are predicted or there."""
    scores = [balance(*counts) for counts in sums.reshape(-1, 3) if counts[1:].any()]
    return sum(scores) / len(scores) if scores else 0.0


def matthews_correlation(predictions: Array, references: Array) -> float:
    """Matthews' correlation coefficient for any number of classes (Gorodkin 2004); 0 where it is undefined."""
    import numpy as np

    size = int(max(predictions.max(), references.max())) + 1
    confusion = np.zeros((size, size))
    np.add.at(confusion, (references.astype(int), predictions.astype(int)), 1)
    true, predicted, n = confusion.sum(1), confusion.sum(0), confusion.sum()
    covariance = confusion.trace() * n - true @ predicted
    spread = np.sqrt(n**2 - predicted @ predicted) * np.sqrt(n**2 - true @ true)
    return float(covariance / spread) if spread else 0.0


def pearson(predictions: Array, references: Array) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    import numpy as np

    # min and max, because rounding can give equal numbers a deviation above 0
    if predictions.min() == predictions.max() or references.min() == references.max():
        return 0.0
    return float(np.corrcoef(predictions.astype(float), references.astype(float))[0, 1])


def spearman(predictions: Array, references: Array) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank."""
    return pearson(_ranks(predictions), _ranks(references))


def _ranks(values: Array) -> Array:
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _squares(predictions: Array, references: Array) -> Array:
    import numpy as np

    squares = (predictions.astype(float) - references.astype(float)) ** 2
    return np.stack([squares, np.ones_like(squares)], axis=1)


def _masked(predictions: Array, references: Array) -> Array:
    """Predictions `(units, 2)`, tokens that are right and the sum of `-log p`; references, how many were masked."""
    import numpy as np

    return np.concatenate([predictions, references[:, None]], axis=1).astype(float)


def _perplexity(sums: Array) -> float:
    import math

    return math.exp(min(share(sums[1], sums[2]), 700.0))  # beyond that a float is infinite


CLASSIFICATION: dict[str, Metric] = {
    "accuracy": RowMetric("The share of rows whose class is right.", _hits, lambda s: share(*s)),
    "f1": RowMetric("F1 of class 1 for two classes, the mean over the classes for more.", _class_counts, _mean_f1),
    "matthews_correlation": matthews_correlation,
}
REGRESSION: dict[str, Metric] = {
    "pearson": pearson,
    "spearman": spearman,
    "mse": RowMetric("Mean squared error.", _squares, lambda s: share(*s)),
}
TOKENS: dict[str, Metric] = {
    "f1": RowMetric("F1 of whole entities, as conlleval counts.", entities.counts, lambda s: balance(*s[:3])),
    "precision": RowMetric("The share of predicted entities that are right.", entities.counts, lambda s: share(*s[:2])),
    "recall": RowMetric("The share of entities that are found.", entities.counts, lambda s: share(s[0], s[2])),
    "accuracy": RowMetric("The share of words whose tag is right.", entities.counts, lambda s: share(*s[3:])),
}
SPANS: dict[str, Metric] = {
    "f1": RowMetric("SQuAD's F1 of words, the mean over questions.", squad.overlaps, lambda s: share(*s)),
    "exact_match": RowMetric("The share of answers that are one of those given.", squad.matches, lambda s: share(*s)),
}
MASKED: dict[str, Metric] = {
    "accuracy": RowMetric("The share of masked tokens that are found.", _masked, lambda s: share(s[0], s[2])),
    "perplexity": RowMetric("The exponential of the mean `-log p` of masked tokens.", _masked, _perplexity),
}
OF_TASK: dict[str, dict[str, Metric]] = {
    "text-classification": CLASSIFICATION,
    "regression": REGRESSION,
    "token-classification": TOKENS,
    "question-answering": SPANS,
    "fill-mask": MASKED,
}
LOWER_IS_BETTER = frozenset({"mse", "perplexity"})


@cache
def metric(name: str, task: str = "text-classification") -> Any:
    """A metric as an `evaluate.Metric`: `metric("f1", "regression").compute(predictions=…, references=…)`.

    Args:
        name: Such as `f1`.
        task: Whose metric; several tasks have one of the same name.
    """
    import evaluate

    function = OF_TASK[task][name]

    class Wrapped(evaluate.Metric):  # type: ignore[name-defined]
        def _info(self) -> Any:
            says = function.says if isinstance(function, RowMetric) else str(function.__doc__).splitlines()[0]
            return evaluate.MetricInfo(  # type: ignore[attr-defined]
                description=says,
                citation="",
                inputs_description="predictions and references: one value a judged unit",
                features=_features(task),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            return {name: function(_array(predictions), _array(references))}

    return Wrapped(keep_in_memory=True)


def _features(task: str) -> Any:
    import datasets

    words, numbers = datasets.Sequence(datasets.Value("string")), datasets.Sequence(datasets.Value("float64"))
    predictions, references = {
        "text-classification": (datasets.Value("int64"),) * 2,
        "regression": (datasets.Value("float64"),) * 2,
        "token-classification": (words, words),
        "question-answering": (datasets.Value("string"), words),
        "fill-mask": (numbers, datasets.Value("float64")),
    }[task]
    return datasets.Features({"predictions": predictions, "references": references})


def _array(values: Any) -> Array:
    import numpy as np

    values = list(values)
    return objects(values) if isinstance(values[0], str | list) and not _numeric(values[0]) else np.asarray(values)


def _numeric(value: Any) -> bool:
    return bool(value) and isinstance(value[0], float)


def objects(values: list[Any]) -> Array:
    """An array of one object a unit, whatever the objects are."""
    import numpy as np

    return np.fromiter(values, dtype=object, count=len(values))


def bootstrap_interval(
    function: Metric, predictions: Array, references: Array, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a metric over judged units (Efron 1979).

    Args:
        function: The metric.
        predictions, references: One entry a unit.
        samples: How often the units are drawn anew, with replacement.
        seed: The same seed draws the same units, so two models are compared on the same draws.
    """
    import numpy as np

    low, high = np.quantile(_resampled(function, predictions, references, samples, seed), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_differences(
    function: Metric, predictions: Array, others: Array, references: Array, samples: int = 1000, seed: int = 0
) -> Array:
    """A metric of one set of predictions less that of another, on the same draws of judged units (paired bootstrap).

    Args:
        function: The metric.
        predictions, others, references: One entry a unit.
        samples: How often the units are drawn anew, with replacement.
        seed: Decides the draws.

    Returns:
        `(samples,)`.
    """
    one, other = (_resampled(function, answers, references, samples, seed) for answers in (predictions, others))
    return one - other


def _resampled(function: Metric, predictions: Array, references: Array, samples: int, seed: int) -> Array:
    """`(samples,)`: the metric of as many draws of the units."""
    import numpy as np

    count = len(references)
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, count, count) for _ in range(samples))
    if isinstance(function, RowMetric):
        rows = function.rows(predictions, references)
        return np.array([function.total(np.bincount(draw, minlength=count) @ rows) for draw in draws])
    return np.array([function(predictions[draw], references[draw]) for draw in draws])
