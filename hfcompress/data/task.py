"""The common part of all tasks: reads rows, makes batches, computes the score.

Only a task knows its labels. A stage asks it for encoded rows, for batches, for the loss on the labels, and for the
score. A new task is one more class, and an entry in `tasks.AnyTask`.
"""

from __future__ import annotations

import atexit
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from hfcompress.data import source
from hfcompress.data.evaluate_metric import AnyMetric, EvaluateMetric
from hfcompress.data.files import require_columns
from hfcompress.data.metrics import LOWER_IS_BETTER, Metric, bootstrap_differences, bootstrap_interval
from hfcompress.data.values import LABEL, TEXT, ColumnType
from hfcompress.utils.errors import HfcompressError, Key, Problem, did_you_mean
from hfcompress.utils.hashing import SHORT, hash_pieces
from hfcompress.utils.logging import log
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]

Split = Literal["train", "dev", "test"]
IGNORED = -100
"""The label of a token that does not count in the loss or the metric."""
IN_A_BATCH = ("input_ids", "token_type_ids", "length", "labels", "index")
"""The columns of encoded rows that make a batch; only `judge` reads the others."""
IN_MEMORY = 2**25
"""The most bytes of texts whose tokens are kept in memory."""


class Splits(StrictModel):
    """The names of a data set's splits, if they are not `train`, `dev` (or `validation`) and `test`."""

    train: str | None = None
    dev: str | None = None
    test: str | None = None

    @property
    def renamed(self) -> dict[str, str]:
        """The splits that have another name."""
        return self.model_dump(exclude_none=True)


@dataclass(frozen=True)
class PlainText:
    """A row as a user would write it.

    Attributes:
        number: The number of the row.
        texts: The text, or the two texts of a pair.
        features: The encoded row: `input_ids` and, if the tokenizer gives them, `token_type_ids`.
    """

    number: int
    texts: tuple[str, ...]
    features: Mapping[str, Any]


class Task(StrictModel):
    """Texts, a task head that reads them, and a metric.

    Attributes:
        head: The kind of task head, a key of `models.architectures.TASK_HEADS`.
        purpose: What its models do, for the card.
        auto_class: The class of transformers that loads a model with this head.
        problem_type: The problem type in the model's config; None if transformers has no name for it.
        pipeline: The name of the task's pipeline in transformers; None if the newest transformers has none.
        truncation: The tokenizer's option for texts that are longer than `max_length`.
        by_token: True if the loss is a mean over labelled tokens, false if over rows.
        outputs: The number of outputs of the head; None if it depends on the data.
        metrics: The metrics by name; each takes predictions and references whose first axis is the judged unit.
        required: The splits that a directory must hold.
        kinds: The kinds of files that it may hold.
    """

    head: ClassVar[str]
    purpose: ClassVar[str] = "reads texts"
    auto_class: ClassVar[str]
    problem_type: ClassVar[str | None] = None
    pipeline: ClassVar[str | None]
    truncation: ClassVar[str | bool] = True
    by_token: ClassVar[bool] = False
    outputs: ClassVar[int | None] = None
    metrics: ClassVar[Mapping[str, Metric]]
    required: ClassVar[tuple[Split, ...]] = ("train", "dev")
    kinds: ClassVar[str] = "csv, tsv, jsonl or parquet"

    dataset: str
    """A Hub id, or a directory with train, dev (or validation) and test files of csv, tsv, jsonl or parquet."""
    config: str | None = None
    """The configuration of a Hub data set, such as `sst2`."""
    text: list[str] = Field(min_length=1, max_length=2)
    """The column with the text, or the two columns of a pair."""
    max_length: int = Field(default=128, ge=4)
    """The number of tokens to which a row is truncated."""
    splits: Splits = Splits()
    """Other names of the splits, such as `{dev: heldout}`."""
    dev_rows: int | None = Field(default=None, ge=1)
    """Rows that the dev split has at least: missing ones are taken from train, by a fixed draw. More rows rule out a
    smaller loss."""
    encoding: str = "utf-8"
    """The encoding of the text files in a directory, such as `cp1252`, `utf-16` or `gb18030`."""

    if TYPE_CHECKING:
        # Each task declares these fields with its own defaults; declared here, they would come before `dataset`.
        type: str
        metric: AnyMetric

    @field_validator("dataset", mode="before")
    @classmethod
    def _name_objects(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)) or value is None or isinstance(value, (bool, int, float, list)):
            return str(value) if isinstance(value, Path) else value
        if isinstance(value, dict) and not any(hasattr(rows, "features") for rows in value.values()):
            return value  # a mapping in a recipe file: not a data set, as pydantic says
        from hfcompress.data.objects import save_dataset

        return save_dataset(value)

    @field_validator("metric", check_fields=False)
    @classmethod
    def _known_metric(cls, name: AnyMetric) -> AnyMetric:
        if isinstance(name, str) and name not in cls.metrics:
            raise ValueError(f"the task has no metric '{name}'; {did_you_mean(name, cls.metrics)}")
        return name

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        try:
            "".encode(name)
        except (LookupError, ValueError):
            raise ValueError(
                f"Python knows no text encoding '{name}'; examples are utf-8, cp1252, utf-16, gb18030"
            ) from None
        return name

    @property
    def column_types(self) -> dict[str, ColumnType]:
        """The columns that are read, and the type of each."""
        return dict.fromkeys(self.text, TEXT)

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are read."""
        return list(self.column_types)

    @property
    def table(self) -> source.Table:
        """The part of the data set that the task reads."""
        return source.Table(self.dataset, self.config, self.splits.renamed, self.column_types, self.encoding)

    @property
    def is_streamed(self) -> bool:
        """True if the length of the train split is not known in advance: training then needs `max_steps`."""
        return False

    @property
    def has_labels(self) -> bool:
        """True if training rows have labels; raw text without masks has none."""
        return True

    def problems(self) -> list[Problem]:
        """Returns the problems of the data that its headers show; a data set on the Hub is checked when it is read."""
        found = self.metric.problems() if isinstance(self.metric, EvaluateMetric) else []
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
        file = self.table.file(split)
        if file is None and split not in self.required and split not in self.splits.renamed:
            return []
        if file is None:
            splits = " and ".join(self.required).replace("dev", "dev (or validation)")
            fix = f"it needs {splits} files of {self.kinds}; `splits:` renames them, `hfcompress init` splits one file"
            return [Problem(f"no {split} file in {self.dataset}", fix, ("task", "dataset"))]
        header, found = file.columns(), []
        for index, column in enumerate([*self.text, *self.columns[len(set(self.text)) :]]):
            key: Key = ("task", "text", index) if index < len(self.text) else ("task", "label")
            try:
                require_columns([column], header, file.path.name)
            except HfcompressError as error:
                found += [replace(p, key=key) for p in error.problems]
        return found

    def head_problems(self, config: Mapping[str, Any]) -> list[Problem]:
        """Returns the reasons, from its config.json, why a model's own head cannot do this task."""
        return []

    def label_problems(self, head: Mapping[str, int] | None) -> list[Problem]:
        """Reads the splits that are used, and returns the problems of their rows.

        Args:
            head: The head's label names and ids; None for a new head, made for the labels of the train split.
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
                targets = self.targets(self.read(split), ids)
                for warning in self.label_warnings(targets, ids) if split == "train" else []:
                    log.warning(warning)
            except HfcompressError as error:
                found += [replace(p, message=f"{split}: {p.message}", key=("task", "dataset")) for p in error.problems]
        return found

    def label_warnings(self, targets: list[Any], labels: Mapping[str, int]) -> list[str]:
        """Returns warnings about the labels of the train split.

        Args:
            targets: The targets of its rows.
            labels: The head's label names and ids.
        """
        return []

    def head_labels(self) -> int | None:
        """Returns the number of outputs of a new head for this task; None if a data set on the Hub decides it."""
        if not source.is_local(self.dataset):
            return None
        try:
            return len(self.label_names())
        except HfcompressError:
            return None

    def count_rows(self, split: Split = "train") -> int | None:
        """Counts the encoded rows of a local split; None if it must be fetched or encoded for that."""
        if not source.is_local(self.dataset):
            return None
        try:
            file = self.table.file(split)
            return None if file is None else file.count()
        except HfcompressError as error:
            raise HfcompressError(replace(p, key=("task", "dataset")) for p in error.problems) from None

    def read(self, split: Split) -> datasets.Dataset:
        """Reads the raw rows of a split.

        Raises:
            HfcompressError: if the split or a column is missing, or there are no rows.
        """
        found = self._move_rows(split, self._find(split))
        if found is None:
            raise HfcompressError(
                f"the data set {self.dataset} has no {split} split", "name it in `task.splits`, or add the file"
            )
        if len(found) == 0:
            raise HfcompressError(f"the {split} split of {self.dataset} has no rows", "give it at least one")
        self._require_values(found, split)
        return found

    def _move_rows(self, split: Split, rows: datasets.Dataset | None) -> datasets.Dataset | None:
        """Moves rows from train to a dev split that has fewer than `dev_rows`; leaves every other split as it is."""
        if rows is None or self.dev_rows is None or split == "test":
            return rows
        import datasets
        import numpy as np

        train, dev = (rows if name == split else self._find(name) for name in ("train", "dev"))
        missing = self.dev_rows - (0 if dev is None else len(dev))
        if train is None or missing <= 0:
            return rows
        if missing >= len(train):
            raise HfcompressError(
                f"task.dev_rows: {self.dev_rows:,} rows are asked for, and train and dev of {self.dataset} have "
                f"{len(train) + self.dev_rows - missing:,}",
                "ask for fewer",
            )
        moved = np.random.default_rng(0).permutation(len(train))[:missing]
        if split == "train":
            return train.select(np.setdiff1d(np.arange(len(train)), moved))
        extra = train.select(np.sort(moved))
        return extra if dev is None else datasets.concatenate_datasets([dev, extra])

    def _find(self, split: Split) -> datasets.Dataset | None:
        return self.table.read(split)

    def _require_values(self, rows: datasets.Dataset, split: Split) -> None:
        for column in self.columns:
            empty = (None,) if column in self.text else (None, "")
            number = next((n for n, value in enumerate(rows[column][:]) if value in empty), None)
            if number is not None:
                raise HfcompressError(
                    f"row {number} of the {split} split of {self.dataset} has nothing in column '{column}'",
                    "fix the row, or leave it out",
                )

    def judged_split(self) -> Split:
        """Chooses the split that the report is measured on: test, or dev if test is missing or has no labels."""
        test = self._find("test")
        return "dev" if test is None or self._lacks_labels(test) else "test"

    def read_slices(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Reads columns of the judged split by which a report is divided: a value for each judged unit.

        Raises:
            HfcompressError: if a column is missing, or a unit is not a row of the data.
        """
        if columns and self.head == "mask":
            raise HfcompressError(
                f"a {self.type} task is judged on blocks of several rows, so no column divides them",
                "leave `measure.slices` out",
            )
        found: dict[str, list[Any]] = {}
        for column in columns:
            table = source.Table(self.dataset, self.config, self.splits.renamed, {column: LABEL}, self.encoding)
            rows = table.read(self.judged_split())
            assert rows is not None
            found[column] = list(rows[column][:])
        return found

    def _lacks_labels(self, rows: datasets.Dataset) -> bool:
        return False

    def fingerprint(self, judged: bool = False) -> str:
        """Hashes the texts and labels of train and dev; if `judged`, of the split that the report is measured on."""
        splits: tuple[Split, ...] = (self.judged_split(),) if judged else ("train", "dev")
        return hash_pieces(piece for split in splits for piece in self._spell_out(self.read(split)))[:SHORT]

    def _spell_out(self, rows: datasets.Dataset) -> Iterator[str]:
        for column in self.columns:
            for values in rows.select_columns([column]).iter(4096):
                yield "".join(f"{value}\x1f" for value in values[column])
            yield "\x1e"

    def batch(
        self,
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        multiple: int | None = None,
        epoch: int | None = None,
    ) -> dict[str, Tensor]:
        """Makes a batch of encoded rows, padded to the longest of them.

        Args:
            features: Encoded rows.
            tokenizer: The model's tokenizer, which knows the pad token.
            multiple: The padded length is a multiple of this number.
            epoch: The epoch, for random parts such as masks; None in evaluation, where they are always the same.

        Returns:
            Token tensors `(rows, length)`, `labels` as the head's loss takes them, and `index`, the rows' numbers.
        """
        import torch

        lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
        longest = int(lengths.max())
        length = longest if multiple is None else -(-longest // multiple) * multiple
        if tokenizer.pad_token_id is None:
            raise HfcompressError(
                f"this {type(tokenizer).__name__} has no pad token, but rows of different lengths must be padded",
                "load it with `models.artifact.load_tokenizer`, which chooses the pad token",
            )
        fills = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        }
        tokens = {
            name: pad_rows([feature[name] for feature in features], length, fill)
            for name, fill in fills.items()
            if name in features[0]
        }
        tokens["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        tokens["index"] = torch.tensor([feature["index"] for feature in features])
        return self.add_labels(tokens, features, tokenizer, epoch)

    def add_labels(
        self,
        tokens: dict[str, Tensor],
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        epoch: int | None,
    ) -> dict[str, Tensor]:
        """Adds `labels`, the targets of the head, to a batch of tokens; the arguments are those of `batch`."""
        import torch

        return {**tokens, "labels": torch.tensor([feature["labels"] for feature in features])}

    def score(self, predictions: Array, references: Array) -> float:
        """Computes the task's metric of predictions and references from `judge`."""
        return self.metric_function(predictions, references)

    def interval(
        self, predictions: Array, references: Array, samples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """Computes the 95% bootstrap interval of the score over the judged units."""
        return bootstrap_interval(self.metric_function, predictions, references, samples, seed)

    @property
    def metric_function(self) -> Metric:
        """The metric, of predictions and references."""
        return self.metrics[self.metric] if isinstance(self.metric, str) else self.metric

    @property
    def metric_name(self) -> str:
        """The name of the metric in the report."""
        return self.metric if isinstance(self.metric, str) else self.metric.key

    @property
    def greater_is_better(self) -> bool:
        """False if a lower score is better."""
        own = self.metric
        return own not in LOWER_IS_BETTER if isinstance(own, str) else own.greater_is_better

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Changes a tokenizer, in place, so that it reads texts as the task does; returns true if it changed.

        Its maximum length must not be below the task's.
        """
        changed = tokenizer.model_max_length < self.max_length
        if changed:
            tokenizer.model_max_length = self.max_length
        return changed

    def encode(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> datasets.Dataset:
        """Encodes rows as token ids, labels, lengths and row numbers, without padding (`batch` pads).

        Args:
            rows: Raw rows.
            tokenizer: The model's tokenizer, as `load_tokenizer` returns it for this task.
            labels: The head's label names and ids.
        """
        raise NotImplementedError

    def plain_texts(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> list[PlainText]:
        """Returns rows as a user of the model would write them, with their encoded form.

        Rows that have no such form (words with a space inside, a context of several windows) are left out.

        Args:
            rows: A few raw rows.
            tokenizer: The model's tokenizer, as `load_tokenizer` returns it for this task.
            labels: The head's label names and ids.
        """
        raise NotImplementedError

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[Any]:
        """Returns the right answer of the head for each row.

        Raises:
            HfcompressError: if a row cannot be used.
        """
        raise NotImplementedError

    def label_names(self) -> list[str]:
        """Returns the names of the head's outputs, in the order of their ids."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the loss of the logits on the labels, a scalar.

        Args:
            logits: The logits of a batch, in the shape that `losses.base.Step` describes.
            labels: The labels of the batch.
            mask: `(batch, length)`, true at real tokens; a head that chooses among tokens ignores the others.
        """
        raise NotImplementedError

    def row_loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the mean over rows of each row's own loss, so that a row's gradient is the same in any batch.

        `loss` does the same, unless it is a mean over labelled tokens: rows have different numbers of these.
        """
        return row_token_loss(logits, labels) if self.by_token else self.loss(logits, labels, mask)

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        """Turns a model's outputs into predictions and references; the first axis of both is the judged unit.

        Args:
            outputs: The logits, as `measure.worker.reduce_logits` reduces them, batch after batch.
            features: The encoded rows, in the same order.
        """
        raise NotImplementedError

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """Makes the best predictions that are possible without the texts: a model must beat them.

        Args:
            references: The references that `judge` returns for the features.
            features: The encoded rows.

        Returns:
            Predictions for the same units.
        """
        raise NotImplementedError

    def gain(self, predictions: Array, others: Array, references: Array, samples: int = 1000, seed: int = 0) -> float:
        """Computes the least gain of one set of predictions over another with 95% certainty, by a paired bootstrap.

        Above 0, the first set is better, also for a metric of which less is better.
        """
        import numpy as np

        sign = 1 if self.greater_is_better else -1
        gains = sign * bootstrap_differences(self.metric_function, predictions, others, references, samples, seed)
        return float(np.quantile(gains, 0.05))


class LabelledTask(Task):
    """A task whose rows carry labels."""

    label: str = "label"
    """The column with the label."""

    label_type: ClassVar[ColumnType] = LABEL

    @property
    def column_types(self) -> dict[str, ColumnType]:
        """The columns that are read, and the type of each."""
        return {**super().column_types, self.label: self.label_type}

    def _lacks_labels(self, rows: datasets.Dataset) -> bool:
        return all(value in (-1, "-1") for value in rows[self.label][:])


def pad_rows(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """Pads rows of different lengths to one tensor `(rows, length)`."""
    import numpy as np
    import torch

    array = np.full((len(rows), length), fill, dtype=np.int64)
    for line, row in zip(array, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(array)


def number_rows(encoded: datasets.Dataset) -> datasets.Dataset:
    """Adds the numbers of the rows; a row then shows only the columns that a batch needs."""
    found = encoded.add_column("index", list(range(len(encoded))))
    return found.with_format(None, columns=[name for name in found.column_names if name in IN_A_BATCH])


def map_batches(
    rows: datasets.Dataset, function: Callable[..., Any], keep: Sequence[str] = (), **options: Any
) -> datasets.Dataset:
    """Applies `function` to batches of rows; the old columns are removed, except those in `keep`.

    Tokens take ten times the memory of their texts, so those of many texts are kept on disk until the process ends.
    """
    removed = [name for name in rows.column_names if name not in keep]
    on_disk = rows.data.nbytes > IN_MEMORY
    file = str(_scratch() / f"{secrets.token_hex(8)}.arrow") if on_disk else None
    return rows.map(
        function,
        batched=True,
        remove_columns=removed,
        desc="tokens",
        load_from_cache_file=False,
        cache_file_name=file,
        **options,
    )


@cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="hfcompress-tokens-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def token_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy, the mean over tokens that have a label; 0 if none has.

    Args:
        logits: `(batch, length, labels)`.
        labels: `(batch, length)`, `IGNORED` at tokens without a label.
        weights: `(labels,)`, the weight of a token of each label in the mean.
    """
    from torch.nn import functional as F

    flat, given = logits.float().flatten(0, 1), labels.flatten()
    summed = F.cross_entropy(flat, given, weight=weights, ignore_index=IGNORED, reduction="sum")
    labelled = given != IGNORED
    if weights is None:
        return summed / labelled.sum().clamp(min=1)
    return summed / weights[given[labelled]].sum() if bool(labelled.any()) else summed


def row_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, the mean over the labelled tokens of a row (0 if it has none), then over rows."""
    from torch.nn import functional as F

    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return (losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)).mean()
