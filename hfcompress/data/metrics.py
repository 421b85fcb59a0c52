"""Metrics of arrays whose first axis is the judged unit: a row, a sentence, a question, a block of text.

scikit-learn and scipy compute the metrics that they have. Most metrics are also formulas of sums over units, so a
bootstrap computes each unit once and then only adds. `evaluate.load(MODULE, …)` loads them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data import entities, squad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_AT_ONCE = 1_000_000
"""Entries of the matrices of draws that are scored at once: 8 MB each."""
Metric = Callable[["Array", "Array"], float]


@dataclass(frozen=True)
class RowMetric:
    """A metric that is a formula of sums over units.

    Attributes:
        says: Its description in one line.
        rows: Computes the numbers to add, `(units, k)`, from predictions and references.
        total: Computes the metric from their sums, `(k,)`.
        library: Computes the same metric of all units by a library; None if no library has it.
        right_or_wrong: True if it is the share of units that are right; `rows` begins with 1 for these, else with 0.
    """

    says: str
    rows: Callable[[Array, Array], Array]
    total: Callable[[Array], float]
    library: Callable[[Array, Array], float] | None = None
    right_or_wrong: bool = False

    def __call__(self, predictions: Array, references: Array) -> float:
        if self.library is not None:
            return self.library(predictions, references)
        return self.total(self.rows(predictions, references).sum(0))


@dataclass(frozen=True)
class DrawnMetric:
    """A metric that is no formula of sums, but scores many draws of the units at once.

    Attributes:
        says: Its description in one line.
        function: Computes the metric of all units.
        score_draws: Computes the metric of each row of two matrices, `(draws, units)`; gives `(draws,)`.
    """

    says: str
    function: Callable[[Array, Array], float]
    score_draws: Callable[[Array, Array], Array]

    def __call__(self, predictions: Array, references: Array) -> float:
        return self.function(predictions, references)


def ratio(part: float, whole: float) -> float:
    """Computes `part / whole`; 0 if `whole` is 0."""
    return float(part / whole) if whole else 0.0


def f1_of_counts(hits: float, predicted: float, there: float) -> float:
    """Computes F1 from counts: the harmonic mean of `hits / predicted` and `hits / there`."""
    return ratio(2 * hits, predicted + there)


def _hits(predictions: Array, references: Array) -> Array:
    import numpy as np

    hits = predictions == references
    return np.stack([hits, np.ones_like(hits)], axis=1).astype(float)


def _class_counts(predictions: Array, references: Array) -> Array:
    """Counts hits, predictions and references: of class 1 if there are two classes, of each class if there are more."""
    import numpy as np

    present = np.union1d(predictions, references)
    classes = present if present.max() > 1 else np.ones(1)
    predicted, there = predictions[:, None] == classes, references[:, None] == classes
    return np.stack([predicted & there, predicted, there], axis=2).reshape(len(references), -1).astype(float)


def _mean_f1(sums: Array) -> float:
    """Computes the mean F1 over the classes that are predicted or expected."""
    scores = [f1_of_counts(*counts) for counts in sums.reshape(-1, 3) if counts[1:].any()]
    return sum(scores) / len(scores) if scores else 0.0


def _f1(predictions: Array, references: Array) -> float:
    import numpy as np
    from sklearn.metrics import f1_score

    average = "binary" if np.union1d(predictions, references).max() <= 1 else "macro"
    return float(f1_score(references, predictions, average=average, zero_division=0.0))


def _class_margins(predictions: Array, references: Array) -> Array:
    """Returns, for each row, 1 if it is right, then the one-hot vectors of its class and of the predicted class."""
    import numpy as np

    classes = np.union1d(predictions, references)
    hits = (predictions == references)[:, None]
    return np.concatenate([hits, references[:, None] == classes, predictions[:, None] == classes], axis=1).astype(float)


def _correlate_margins(sums: Array) -> float:
    """R_K of Gorodkin 2004, from the hits and how often each class is expected and predicted; 0 if it is undefined."""
    import numpy as np

    hits, (true, predicted) = sums[0], np.split(sums[1:], 2)
    n = true.sum()
    spread = np.sqrt(n**2 - predicted @ predicted) * np.sqrt(n**2 - true @ true)
    return float((hits * n - true @ predicted) / spread) if spread else 0.0


def _matthews_correlation(predictions: Array, references: Array) -> float:
    import numpy as np
    from sklearn.metrics import matthews_corrcoef

    if len(np.union1d(predictions, references)) < 2:
        return 0.0  # which scikit-learn returns too, with a warning
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Array, references: Array) -> float:
    """Pearson's correlation; 0 if one side does not vary."""
    from scipy.stats import pearsonr

    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    return float(pearsonr(predictions.astype(float), references.astype(float)).statistic)


def spearman(predictions: Array, references: Array) -> float:
    """Spearman's rank correlation, with mean ranks for ties; 0 if one side does not vary."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions), rankdata(references))


def _correlate_rows(predictions: Array, references: Array) -> Array:
    """Computes Pearson's correlation of each row of two matrices, `(draws, units)`; 0 where one side does not vary."""
    import numpy as np

    constant = np.zeros(len(predictions), dtype=bool)
    sides = []
    for values in (predictions.astype(float), references.astype(float)):
        constant |= values.min(axis=1) == values.max(axis=1)
        centred = values - values.mean(axis=1, keepdims=True)
        sides.append(centred / np.where(constant, 1.0, np.linalg.norm(centred, axis=1))[:, None])
    # rounding can lead slightly beyond 1
    return np.where(constant, 0.0, np.clip((sides[0] * sides[1]).sum(axis=1), -1, 1))


def _correlate_ranks(predictions: Array, references: Array) -> Array:
    from scipy.stats import rankdata

    return _correlate_rows(rankdata(predictions, axis=1), rankdata(references, axis=1))


def _is_constant(values: Array) -> bool:
    # min and max, because rounding can give equal numbers a deviation above 0
    return bool(values.min() == values.max())


def _squares(predictions: Array, references: Array) -> Array:
    import numpy as np

    squares = (predictions.astype(float) - references.astype(float)) ** 2
    return np.stack([squares, np.ones_like(squares)], axis=1)


def _sum_masked(predictions: Array, references: Array) -> Array:
    """Joins predictions `(units, 2)` (right tokens, sum of `-log p`) and references `(units,)` (masked tokens)."""
    import numpy as np

    return np.concatenate([predictions, references[:, None]], axis=1).astype(float)


def _perplexity(sums: Array) -> float:
    import math

    return math.exp(min(ratio(sums[1], sums[2]), 700.0))  # beyond that a float is infinite


CLASSIFICATION: dict[str, Metric] = {
    "accuracy": RowMetric("The share of rows whose class is right.", _hits, lambda s: ratio(*s), right_or_wrong=True),
    "f1": RowMetric("F1 of class 1 for two classes, the mean over the classes for more.", _class_counts, _mean_f1, _f1),
    "matthews_correlation": RowMetric(
        "Matthews' correlation coefficient for any number of classes; 0 if it is undefined.",
        _class_margins,
        _correlate_margins,
        _matthews_correlation,
    ),
}
REGRESSION: dict[str, Metric] = {
    "pearson": DrawnMetric("Pearson's correlation; 0 if one side does not vary.", pearson, _correlate_rows),
    "spearman": DrawnMetric(
        "Spearman's rank correlation, with mean ranks for ties; 0 if one side does not vary.",
        spearman,
        _correlate_ranks,
    ),
    "mse": RowMetric("Mean squared error.", _squares, lambda s: ratio(*s)),
}
TOKENS: dict[str, Metric] = {
    "f1": RowMetric(
        "F1 of whole entities, as conlleval counts.", entities.count_entities, lambda s: f1_of_counts(*s[:3])
    ),
    "precision": RowMetric(
        "The share of predicted entities that are right.", entities.count_entities, lambda s: ratio(*s[:2])
    ),
    "recall": RowMetric("The share of entities that are found.", entities.count_entities, lambda s: ratio(s[0], s[2])),
    "accuracy": RowMetric("The share of words whose tag is right.", entities.count_entities, lambda s: ratio(*s[3:])),
}
SPANS: dict[str, Metric] = {
    "f1": RowMetric("SQuAD's F1 of words, the mean over questions.", squad.score_overlap, lambda s: ratio(*s)),
    "exact_match": RowMetric(
        "The share of answers that are one of those given.", squad.score_match, lambda s: ratio(*s), right_or_wrong=True
    ),
}
MASKED: dict[str, Metric] = {
    "accuracy": RowMetric("The share of masked tokens that are found.", _sum_masked, lambda s: ratio(s[0], s[2])),
    "perplexity": RowMetric("The exponential of the mean `-log p` of masked tokens.", _sum_masked, _perplexity),
}
OF_TASK: dict[str, dict[str, Metric]] = {
    "text-classification": CLASSIFICATION,
    "regression": REGRESSION,
    "token-classification": TOKENS,
    "question-answering": SPANS,
    "fill-mask": MASKED,
}
LOWER_IS_BETTER = frozenset({"mse", "perplexity"})
MODULE = str(Path(__file__).with_name("metric_module"))
"""The path for `evaluate.load`, which also needs a configuration such as `text-classification.f1`."""


def as_array(values: Any) -> Array:
    """Converts values of judged units to the array that metrics take: of numbers, or of one object for each unit."""
    import numpy as np

    values = list(values)
    return (
        object_array(values)
        if isinstance(values[0], str | list) and not _is_list_of_numbers(values[0])
        else np.asarray(values)
    )


def _is_list_of_numbers(value: Any) -> bool:
    return bool(value) and isinstance(value[0], float)


def object_array(values: list[Any]) -> Array:
    """Makes an array of one object for each unit, of any type."""
    import numpy as np

    return np.fromiter(values, dtype=object, count=len(values))


def bootstrap_interval(
    function: Metric, predictions: Array, references: Array, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Computes the 95% percentile bootstrap interval of a metric over judged units (Efron 1979).

    Args:
        function: The metric.
        predictions, references: One entry for each unit.
        samples: The number of draws of all units, with replacement.
        seed: The same seed draws the same units, so that two models are compared on the same draws.
    """
    import numpy as np

    low, high = np.quantile(resample(function, predictions, references, samples, seed), [0.025, 0.975])
    return float(low), float(high)


def bootstrap_differences(
    function: Metric, predictions: Array, others: Array, references: Array, samples: int = 1000, seed: int = 0
) -> Array:
    """Computes the difference of a metric between two sets of predictions on the same draws (paired bootstrap).

    Args:
        function: The metric.
        predictions, others, references: One entry for each unit.
        samples: The number of draws of all units, with replacement.
        seed: Decides the draws.

    Returns:
        `(samples,)`.
    """
    one, other = (resample(function, answers, references, samples, seed) for answers in (predictions, others))
    return one - other


def resample(
    function: Metric,
    predictions: Array,
    references: Array,
    samples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Any] | Array | None = None,
) -> Array:
    """Computes a metric of units that are drawn anew, with replacement.

    Args:
        function, predictions, references, samples, seed: Those of `bootstrap_interval`.
        clusters: What each unit belongs to, such as a question's document. Units of one cluster resemble one another,
            so whole clusters are drawn (Davison and Hinkley 1997, section 3.8). None: each unit is drawn by itself.

    Returns:
        `(samples,)`.
    """
    import numpy as np

    numbers = np.arange(len(references)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, count, count) for _ in range(samples))
    if isinstance(function, RowMetric):
        rows = function.rows(predictions, references)
        if clusters is not None:
            rows = np.stack([np.bincount(numbers, weights=column, minlength=count) for column in rows.T], axis=1)
        return np.array([function.total(np.bincount(draw, minlength=count) @ rows) for draw in draws])
    if isinstance(function, DrawnMetric) and clusters is None:
        scores = []
        while part := list(islice(draws, max(_AT_ONCE // count, 1))):
            rows = np.stack(part)
            scores.append(function.score_draws(predictions[rows], references[rows]))
        return np.concatenate(scores)
    if clusters is not None:
        members = [np.flatnonzero(numbers == number) for number in range(count)]
        draws = (np.concatenate([members[number] for number in draw]) for draw in draws)
    return np.array([function(predictions[draw], references[draw]) for draw in draws])
