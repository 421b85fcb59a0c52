"""Tasks with one answer for each text, or pair of texts: a class or a score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.data.evaluate_metric import AnyMetric
from hfcompress.data.labels import find_label_warnings, make_label_finder, sort_labels, unknown_label_error
from hfcompress.data.metrics import CLASSIFICATION, REGRESSION, Metric
from hfcompress.data.task import LabelledTask, PlainText, map_batches, number_rows
from hfcompress.data.values import SCORE, ColumnType, show_value
from hfcompress.utils.errors import HfcompressError, Problem

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]


class SequenceTask(LabelledTask):
    """The common part of classification and regression."""

    head: ClassVar[str] = "sequence"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    pipeline: ClassVar[str | None] = "text-classification"

    def head_problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Reports a head that was trained for several labels per text, or for scores if the task has classes."""
        trained = config.get("problem_type")
        if trained not in ("multi_label_classification", "regression") or trained == self.problem_type:
            return []
        message = f"the model's head was trained for {trained.replace('_', ' ')}, the task is {self.type}"
        return [Problem(message, "name a model for this task, or put a `finetune` stage first", ("model",))]

    def encode(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> datasets.Dataset:
        targets = self.targets(rows, labels)

        def tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
            encoded = tokenizer(*(batch[column] for column in self.text), truncation=True, max_length=self.max_length)
            return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

        encoded = map_batches(rows.select_columns(list(dict.fromkeys(self.text))), tokens, batch_size=4096)
        return number_rows(encoded.add_column("labels", targets))

    def plain_texts(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> list[PlainText]:
        columns = [list(rows[column]) for column in self.text]
        features = self.encode(rows, tokenizer, labels)
        return [
            PlainText(number, texts, feature)
            for number, (texts, feature) in enumerate(zip(zip(*columns, strict=True), features, strict=True))
        ]

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        import numpy as np

        return self.predictions(outputs), np.asarray(features["labels"][:])

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """Gives every row the same answer: the one that scores best."""
        import numpy as np

        return np.full_like(references, self.best_constant(references))

    def predictions(self, logits: Array) -> Array:
        """Turns logits `(rows, labels)` into answers."""
        raise NotImplementedError

    def best_constant(self, references: Array) -> Any:
        """Finds the single answer that scores best when every row gets it."""
        raise NotImplementedError


class TextClassification(SequenceTask):
    """Predicts one class for each text, or pair of texts."""

    purpose: ClassVar[str] = "classifies texts"
    metrics: ClassVar[Mapping[str, Metric]] = CLASSIFICATION
    problem_type: ClassVar[str | None] = "single_label_classification"

    type: Literal["text-classification"] = "text-classification"
    metric: AnyMetric = "accuracy"
    """`accuracy`, `f1` or `matthews_correlation`, or a module of `evaluate`."""

    def label_names(self) -> list[str]:
        """Returns the classes in the order of their ids: the names of a `ClassLabel`, else the labels of train."""
        rows = self.read("train")
        names = getattr(rows.features[self.label], "names", None)
        if names:
            return list(names)
        values = sort_labels(rows[self.label][:])
        if len(values) < 2:
            raise HfcompressError(
                f"the train split has one class only ({show_value(values[0])} in column '{self.label}')",
                "a classifier needs rows of at least two classes",
            )
        return values

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[int]:
        """Finds the class id of each row; a label of the data is an id or a name of the head.

        Raises:
            HfcompressError: if the head does not have a label.
        """
        names = getattr(rows.features[self.label], "names", None)
        find = make_label_finder(labels, names)
        found = [find(value) for value in rows[self.label][:]]
        if -1 in found:
            number = found.index(-1)
            raise unknown_label_error(number, rows[number][self.label], self.label, labels, names)
        return found

    def label_warnings(self, targets: list[int], labels: Mapping[str, int]) -> list[str]:
        """Warns of classes that no row of train has, and of classes that look alike."""
        return find_label_warnings(set(targets), labels)

    def predictions(self, logits: Array) -> Array:
        """Turns logits `(rows, labels)` into class ids."""
        return logits.argmax(-1)

    def best_constant(self, references: Array) -> int:
        """Finds the class that scores best when every row gets it."""
        import numpy as np

        classes = np.unique(references).tolist()
        return int(max(classes, key=lambda index: self.score(np.full_like(references, index), references)))

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy, the mean over rows, weighted by the `weights` of their classes, `(classes,)`, if given."""
        from torch.nn import functional as F

        return F.cross_entropy(logits.float(), labels, weight=weights)


class Regression(SequenceTask):
    """Predicts a score for each text, or pair of texts."""

    purpose: ClassVar[str] = "scores texts"
    metrics: ClassVar[Mapping[str, Metric]] = REGRESSION
    problem_type: ClassVar[str | None] = "regression"
    outputs: ClassVar[int | None] = 1
    label_type: ClassVar[ColumnType] = SCORE

    type: Literal["regression"] = "regression"
    label: str = "score"
    """The column with the score."""
    metric: AnyMetric = "pearson"
    """`pearson`, `spearman` or `mse`, or a module of `evaluate`."""

    def head_labels(self) -> int:
        """Returns 1: the score."""
        return 1

    def label_names(self) -> list[str]:
        """Returns the name of the one output, which is that of the column."""
        return [self.label]

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[float]:
        """Returns the scores.

        Raises:
            HfcompressError: if a value is not a finite number.
        """
        import math

        found = [float(value) for value in rows[self.label][:]]
        number = next((n for n, score in enumerate(found) if not math.isfinite(score)), None)
        if number is not None:
            raise HfcompressError(
                f"row {number} has {found[number]!r} in column '{self.label}', which is not a finite number",
                "fix the row, or leave it out",
            )
        return found

    def predictions(self, logits: Array) -> Array:
        """Turns outputs `(rows, 1)` into scores."""
        return logits.reshape(-1)

    def best_constant(self, references: Array) -> float:
        """Computes the mean score."""
        return float(references.mean())

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean squared error."""
        from torch.nn import functional as F

        return F.mse_loss(logits.float().squeeze(-1), labels.float())
