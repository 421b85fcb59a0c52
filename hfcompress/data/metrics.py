"""Metrics as functions of whole arrays, so that a bootstrap can call them a thousand times.

`metric(name)` wraps one as an `evaluate.Metric`, which needs no download: the arithmetic is here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def accuracy(predictions: Array, references: Array) -> float:
    """The share of predictions that equal their reference."""
    return float((predictions == references).mean())


def f1(predictions: Array, references: Array, binary: bool | None = None) -> float:
    """F1 of class 1 for two classes, the macro average for more; 0 where a class is neither predicted nor there.

    Args:
        predictions, references: Class ids.
        binary: Which of the two; where it is left out, the ids that occur decide.
    """
    import numpy as np

    if _binary(predictions, references) if binary is None else binary:
        return _f1_of(predictions, references, 1)
    return float(np.mean([_f1_of(predictions, references, c) for c in np.union1d(predictions, references)]))


def _binary(predictions: Array, references: Array) -> bool:
    return bool(max(predictions.max(), references.max()) <= 1)


def _f1_of(predictions: Array, references: Array, label: int) -> float:
    hits = int(((predictions == label) & (references == label)).sum())
    total = int((predictions == label).sum() + (references == label).sum())
    return 2 * hits / total if total else 0.0


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


def mse(predictions: Array, references: Array) -> float:
    """Mean squared error."""
    return float(((predictions.astype(float) - references.astype(float)) ** 2).mean())


CLASSIFICATION: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
}
REGRESSION: dict[str, Callable[[Array, Array], float]] = {"pearson": pearson, "spearman": spearman, "mse": mse}
LOWER_IS_BETTER = frozenset({"mse"})


@cache
def metric(name: str) -> Any:
    """The metric as an `evaluate.Metric`: `metric("accuracy").compute(predictions=…, references=…)`."""
    import datasets
    import evaluate

    function = {**CLASSIFICATION, **REGRESSION}[name]
    value_type = "int64" if name in CLASSIFICATION else "float64"

    class Metric(evaluate.Metric):  # type: ignore[name-defined]
        def _info(self) -> Any:
            features = {key: datasets.Value(value_type) for key in ("predictions", "references")}
            return evaluate.MetricInfo(  # type: ignore[attr-defined]
                description=(function.__doc__ or "").splitlines()[0],
                citation="",
                inputs_description="predictions and references: one value a row",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
            import numpy as np

            return {name: function(np.asarray(predictions), np.asarray(references))}

    return Metric(keep_in_memory=True)


def bootstrap_interval(
    name: str, predictions: Array, references: Array, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a metric over rows (Efron 1979).

    Args:
        name: A key of `CLASSIFICATION` or `REGRESSION`.
        predictions, references: One value a row.
        samples: How often the rows are drawn anew, with replacement.
        seed: The same seed draws the same rows, so two models are compared on the same draws.
    """
    import numpy as np

    function = {**CLASSIFICATION, **REGRESSION}[name]
    if function is f1:  # a draw that misses a class must not switch the average
        function = partial(f1, binary=_binary(predictions, references))
    generator = np.random.default_rng(seed)
    draws = (generator.integers(0, len(references), len(references)) for _ in range(samples))
    values = [function(predictions[rows], references[rows]) for rows in draws]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
