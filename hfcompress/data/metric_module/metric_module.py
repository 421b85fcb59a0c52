"""The metrics of hfcompress for `evaluate.load(hfcompress.data.metrics.MODULE, "TASK.METRIC")`.

The configuration is a task and one of its metrics, such as `token-classification.f1`. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hfcompress.data import metrics

_WORDS, _NUMBERS = datasets.Sequence(datasets.Value("string")), datasets.Sequence(datasets.Value("float64"))
_FORMS = {
    "text-classification": (datasets.Value("int64"), datasets.Value("int64")),
    "regression": (datasets.Value("float64"), datasets.Value("float64")),
    "token-classification": (_WORDS, _WORDS),
    "question-answering": (datasets.Value("string"), _WORDS),
    "fill-mask": (_NUMBERS, datasets.Value("float64")),
}
"""The features of predictions and references."""


class MetricModule(evaluate.Metric):  # type: ignore[name-defined]
    """A metric of a task; predictions and references hold one value a judged unit."""

    def _info(self) -> Any:
        self._task, _, self._name = self.config_name.partition(".")
        known = metrics.OF_TASK.get(self._task, {})
        if self._name not in known:
            names = [f"{task}.{name}" for task, of_task in metrics.OF_TASK.items() for name in of_task]
            raise ValueError(f"no metric '{self.config_name}'; the configurations are {', '.join(names)}")
        self.function = known[self._name]
        predictions, references = _FORMS[self._task]
        return evaluate.MetricInfo(  # type: ignore[attr-defined]
            description=str(getattr(self.function, "says", None) or self.function.__doc__).splitlines()[0],
            citation="",
            inputs_description="predictions and references: one value a judged unit",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        arrays = (metrics.as_array(values) for values in (predictions, references))
        return {self._name: self.function(*arrays)}
