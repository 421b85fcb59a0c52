"""Tasks: what the data looks like, which head reads it, and which metric judges it.

A task is the only place that knows its labels. A stage asks it for encoded rows, for a batch, for the loss that the
labels give and for the metric; a new task is one more class here and an entry in `Task`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hfcompress.base.component import Strict
from hfcompress.base.errors import HfcompressError, Problem, did_you_mean
from hfcompress.data import metrics, source

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "dev", "test"]


class Splits(Strict):
    """What a data set calls its splits, where it is not `train`, `dev` (or `validation`) and `test`."""

    train: str | None = None
    dev: str | None = None
    test: str | None = None

    @property
    def named(self) -> dict[str, str]:
        """Those that are renamed."""
        return self.model_dump(exclude_none=True)


class _SequenceTask(Strict):
    """What the tasks that read one text or a pair share."""

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metrics: ClassVar[Mapping[str, Any]]

    dataset: str
    """Hub id, or a directory with train, dev (or validation) and test files of csv, tsv, jsonl or parquet."""
    config: str | None = None
    """The configuration of a Hub data set, such as `sst2`."""
    text: list[str] = Field(min_length=1, max_length=2)
    """The column with the text, or the two columns of a pair."""
    label: str = "label"
    """The column with the label."""
    max_length: int = Field(default=128, ge=4)
    """Tokens a row is truncated to."""
    splits: Splits = Splits()
    """Other names of the splits, such as `{dev: heldout}`."""

    @field_validator("metric", check_fields=False)
    @classmethod
    def _known_metric(cls, name: str) -> str:
        if name not in cls.metrics:
            raise ValueError(f"the task has no metric '{name}'; {did_you_mean(name, cls.metrics)}")
        return name

    def problems(self) -> list[Problem]:
        """What is wrong with the data, as far as headers tell; Hub data sets are looked at when they are read."""
        found: list[Problem] = []
        try:
            if not source.is_local(self.dataset):
                source.refuse_a_path(self.dataset, "data")
                return found
            for split in ("train", "dev", "test"):
                found += self._header_problems(split)
        except HfcompressError as error:
            found += [replace(p, key=("task", "dataset")) for p in error.problems]
        return found

    def _header_problems(self, split: Split) -> list[Problem]:
        path = source.split_file(self.dataset, split, self.splits.named)
        if path is None and split == "test" and self.splits.test is None:
            return []
        if path is None:
            fix = "it needs train and dev (or validation) files of csv, tsv, jsonl or parquet; `splits:` renames them"
            return [Problem(f"no {split} file in {self.dataset}", fix, ("task", "dataset"))]
        header, found = source.columns(path), []
        for index, column in enumerate([*self.text, self.label]):
            key: tuple[str | int, ...] = ("task", "text", index) if index < len(self.text) else ("task", "label")
            if column not in header:
                found.append(Problem(f"{path.name} has no column '{column}'", did_you_mean(column, header), key))
        return found

    def label_problems(self, head: Mapping[str, int] | None) -> list[Problem]:
        """What is wrong with the labels of the splits that are used; this reads them.

        Args:
            head: The head's label names and ids; None for a head that is made for the train split's labels.
        """
        found: list[Problem] = []
        try:
            names = self.label_names()
            ids = head if head is not None else {name: index for index, name in enumerate(names)}
            splits: list[Split] = ["train", "dev", self.judged_split()]
        except HfcompressError as error:
            return [replace(p, key=("task", "dataset")) for p in error.problems]
        for split in dict.fromkeys(splits):
            try:
                self.targets(self.read(split), ids)
            except HfcompressError as error:
                found += [replace(p, message=f"{split}: {p.message}", key=("task", "dataset")) for p in error.problems]
        return found

    def head_labels(self) -> int | None:
        """Outputs of a head that is made for this task; None where only reading the Hub would tell."""
        if not source.is_local(self.dataset):
            return None
        try:
            return len(self.label_names())
        except HfcompressError:
            return None

    def rows(self, split: Split = "train") -> int | None:
        """How many rows a local split has; None where only reading the Hub would tell."""
        if not source.is_local(self.dataset):
            return None
        path = source.split_file(self.dataset, split, self.splits.named)
        if path is None or path.suffix == ".parquet":
            return None if path is None else _parquet_rows(path)
        with path.open("rb") as stream:
            lines, last = 0, b"\n"
            while block := stream.read(1 << 20):
                lines, last = lines + block.count(b"\n"), block[-1:]
        return lines + (last != b"\n") - (path.suffix in (".csv", ".tsv"))

    def read(self, split: Split) -> datasets.Dataset:
        """The raw rows of a split.

        Raises:
            HfcompressError: where the split or a column is missing, or there is no row.
        """
        found = source.read_split(self.dataset, self.config, split, self.splits.named)
        if found is None:
            raise HfcompressError(
                f"the data set {self.dataset} has no {split} split", "rename one in `task.splits`, or add the file"
            )
        for column in [*self.text, self.label]:
            if column not in found.column_names:
                raise HfcompressError(
                    f"the {split} split of {self.dataset} has no column '{column}'",
                    did_you_mean(column, found.column_names),
                )
        if len(found) == 0:
            raise HfcompressError(f"the {split} split of {self.dataset} has no rows", "give it at least one")
        self._require_values(found, split)
        return found

    def _require_values(self, rows: datasets.Dataset, split: Split) -> None:
        for column in [*self.text, self.label]:
            empty = (None, "") if column == self.label else (None,)
            number = next((n for n, value in enumerate(rows[column][:]) if value in empty), None)
            if number is not None:
                raise HfcompressError(
                    f"row {number} of the {split} split of {self.dataset} has nothing in column '{column}'",
                    "mend the row, or leave it out",
                )

    def judged_split(self) -> Split:
        """The split that the report is measured on: test, or dev where there is no test, or only one without labels."""
        test = source.read_split(self.dataset, self.config, "test", self.splits.named)
        if test is None or (self.label in test.column_names and set(test[self.label]) == {-1}):
            return "dev"
        return "test"

    def fingerprint(self) -> str:
        """A hash of the texts and labels that training and choosing see."""
        digest = hashlib.sha256()
        for split in ("train", "dev"):
            rows = self.read(split)  # type: ignore[arg-type]
            for column in [*self.text, self.label]:
                digest.update("\x1f".join(map(str, rows[column])).encode())
        return digest.hexdigest()[:16]

    def encode(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> datasets.Dataset:
        """Token ids, labels and lengths; no padding, which the batch decides.

        Args:
            rows: Raw rows.
            tokenizer: The model's.
            labels: The head's label names and ids.
        """
        targets = self.targets(rows, labels)

        def tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
            texts = [[str(text) for text in batch[column]] for column in self.text]
            encoded = tokenizer(*texts, truncation=True, max_length=self.max_length)
            return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

        encoded = rows.select_columns(self.text).map(
            tokens, batched=True, batch_size=4096, remove_columns=self.text, desc="tokens", load_from_cache_file=False
        )
        return encoded.add_column("labels", targets)

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[Any]:
        """What the head should answer for each row."""
        raise NotImplementedError

    def label_names(self) -> list[str]:
        """The names of the head's outputs, in the order of their ids."""
        raise NotImplementedError


class TextClassification(_SequenceTask):
    """One class a text, or a pair of texts."""

    metrics: ClassVar[Mapping[str, Any]] = metrics.CLASSIFICATION
    problem_type: ClassVar[str] = "single_label_classification"

    type: Literal["text-classification"]
    metric: str = "accuracy"
    """accuracy, f1 or matthews_correlation."""

    def label_names(self) -> list[str]:
        """The classes, in the order of their ids: a Hub feature's names, else the sorted values of the train split."""
        rows = self.read("train")
        names = getattr(rows.features[self.label], "names", None)
        if names:
            return list(names)
        values = set(rows[self.label])
        if len(values) < 2:
            raise HfcompressError(
                f"the train split has one class only ({next(iter(values))!r} in column '{self.label}')",
                "a classifier needs rows of at least two",
            )
        return [str(value) for value in sorted(values)]

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[int]:
        """Class ids; a label is an id of the head's, or one of its names.

        Raises:
            HfcompressError: for a label that the head does not have.
        """
        ids = {str(name): index for name, index in (labels or {}).items()}
        found: list[int] = []
        for number, value in enumerate(rows[self.label]):
            is_id = not isinstance(value, bool) and str(value) not in ids and re.fullmatch(r"-?[0-9]+", str(value))
            index = int(value) if is_id else ids.get(str(value), -1)
            if not 0 <= index < len(ids):
                raise HfcompressError(
                    f"row {number} has the label {value!r} in column '{self.label}', outside the model's {len(ids)} "
                    f"labels ({', '.join(ids)})",
                    "mend the row, or use a model whose head has that label",
                )
            found.append(index)
        return found

    def predictions(self, logits: NDArray[Any]) -> NDArray[Any]:
        """`(rows, labels)` logits to class ids."""
        return logits.argmax(-1)

    def baseline(self, references: NDArray[Any]) -> float:
        """What always answering the most frequent class scores, by this task's metric."""
        import numpy as np

        constant = np.full_like(references, np.bincount(references).argmax())
        return float(self.metrics[self.metric](constant, references))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, the mean over rows."""
        from torch.nn import functional as F

        return F.cross_entropy(logits.float(), labels)


class Regression(_SequenceTask):
    """A score a text, or a pair of texts."""

    metrics: ClassVar[Mapping[str, Any]] = metrics.REGRESSION
    problem_type: ClassVar[str] = "regression"

    type: Literal["regression"]
    label: str = "score"
    metric: str = "pearson"
    """pearson, spearman or mse."""

    def head_labels(self) -> int:
        """One: the score."""
        return 1

    def label_names(self) -> list[str]:
        """One output, named after its column."""
        return [self.label]

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[float]:
        """Scores.

        Raises:
            HfcompressError: for a value that is not a finite number.
        """
        import math

        found = []
        for number, value in enumerate(rows[self.label]):
            try:
                score = float(value)
            except (TypeError, ValueError):
                score = math.nan
            if not math.isfinite(score):
                raise HfcompressError(
                    f"row {number} has {value!r} in column '{self.label}', which is not a finite number", "mend the row"
                )
            found.append(score)
        return found

    def predictions(self, logits: NDArray[Any]) -> NDArray[Any]:
        """`(rows, 1)` outputs to scores."""
        return logits.reshape(-1)

    def baseline(self, references: NDArray[Any]) -> float:
        """What always answering the mean scores, by this task's metric."""
        import numpy as np

        return float(self.metrics[self.metric](np.full_like(references, references.mean()), references))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error."""
        from torch.nn import functional as F

        return F.mse_loss(logits.float().squeeze(-1), labels.float())


Task = Annotated[TextClassification | Regression, Field(discriminator="type")]


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(path).num_rows)
