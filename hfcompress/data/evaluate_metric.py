"""Metrics of the `evaluate` library in a recipe: modules on this machine or on the Hub."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, Tag

from hfcompress.data.entities import MISSED, OUTSIDE
from hfcompress.data.hub import hub_calls
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.places import local_path
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class EvaluateMetric(StrictModel):
    """A metric that `evaluate.load` loads. Its code runs on this machine: name only a module that you trust.

    It gets the predictions of the task: class ids, scores, lists of tags, or texts (question answering
    compares each with a list of answers).
    """

    evaluate: str = Field(min_length=1)
    """A script or a directory (`./my_metric`), or the id of a module on the Hub (`accuracy`, `user/my_metric`)."""
    config: str | None = None
    """The configuration of a module that has several."""
    key: str = Field(min_length=1)
    """The key of the score among the values that the module computes; the report names the metric by it."""
    greater_is_better: bool = True
    """False for an error, such as a distance."""

    @property
    def is_path(self) -> bool:
        """True if the module is named by a path, not by a Hub id."""
        return self.evaluate.startswith((".", "/", "~"))

    def problems(self) -> list[Problem]:
        """Reports a script that is missing; a module on the Hub is looked up when it is loaded."""
        path = local_path(self.evaluate)
        if not self.is_path or path.is_file() or (path / f"{path.resolve().name}.py").is_file():
            return []
        fix = "name a script, or a directory NAME that holds NAME.py"
        return [Problem(f"no metric in {self.evaluate}", fix, ("task", "metric", "evaluate"))]

    def __call__(self, predictions: Array, references: Array) -> float:
        """Computes the score; predictions and references have one entry for each judged unit.

        Raises:
            HfcompressError: if the module cannot be loaded, refuses these values, or does not compute `key`.
        """
        try:
            found = _load(self).compute(predictions=_plain(predictions), references=_plain(references))
        except HfcompressError:
            raise
        except Exception as error:  # foreign code may raise anything
            message = f"the metric {self.evaluate} failed: {type(error).__name__}: {error}"
            raise HfcompressError(message, "check that it takes what this task predicts") from error
        value = (found or {}).get(self.key)
        try:
            score = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            keys = ", ".join(map(str, found or {})) or "nothing"
            message = f"the metric {self.evaluate} has no finite number under '{self.key}' (it computes {keys})"
            raise HfcompressError(message, "set `metric: {key: …}` to a value that it computes")
        return score


AnyMetric = Annotated[
    Annotated[str, Tag("named_metric")] | Annotated[EvaluateMetric, Tag("evaluate_metric")],
    Discriminator(lambda value: "named_metric" if isinstance(value, str) else "evaluate_metric"),
]
"""The name of one of the task's metrics, or a module of `evaluate`."""


@cache
def _load(metric: EvaluateMetric) -> Any:
    import evaluate

    spec = str(local_path(metric.evaluate)) if metric.is_path else metric.evaluate
    try:
        with hub_calls(f"metric '{metric.evaluate}'"):
            return evaluate.load(spec, metric.config, keep_in_memory=True)  # type: ignore[attr-defined]
    except (FileNotFoundError, ImportError, ValueError) as error:
        message = f"the metric {metric.evaluate} cannot be loaded: {error}"
        raise HfcompressError(message, "check the name, and install what the module imports") from error


def _plain(values: Array) -> list[Any]:
    """Converts to Python values; the tag of a word that the model did not see becomes `O`, which every module knows."""
    return [
        [OUTSIDE if tag == MISSED else tag for tag in value] if isinstance(value, list) else value
        for value in values.tolist()
    ]
