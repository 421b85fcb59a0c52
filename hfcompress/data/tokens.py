"""The task of token classification: one tag for each word, such as entities or parts of speech."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.data.entities import MISSED, OUTSIDE
from hfcompress.data.evaluate_metric import AnyMetric
from hfcompress.data.labels import (
    find_label_warnings,
    list_names,
    make_label_finder,
    names_by_id,
    sort_labels,
    unknown_label_error,
)
from hfcompress.data.metrics import TOKENS, Metric, object_array
from hfcompress.data.task import IGNORED, LabelledTask, PlainText, map_batches, number_rows, pad_rows, token_loss
from hfcompress.data.values import TAGS, WORDS, ColumnType
from hfcompress.models.padding import set_option
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import info_once

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]


class TokenClassification(LabelledTask):
    """Predicts a tag for each word of a list of words.

    The tag of a word stands at its first token. A word that `max_length` cuts off counts as missed: its entity is not
    found and its tag is wrong, so a shorter `max_length` cannot raise the score.
    """

    head: ClassVar[str] = "token"
    purpose: ClassVar[str] = "labels the words of a text"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    pipeline: ClassVar[str | None] = "token-classification"
    by_token: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = TOKENS
    label_type: ClassVar[ColumnType] = TAGS

    type: Literal["token-classification"] = "token-classification"
    text: list[str] = Field(default=["tokens"], min_length=1, max_length=1)
    """The column with the list of words."""
    label: str = "ner_tags"
    """The column with the list of tags (names or ids), one for each word."""
    metric: AnyMetric = "f1"
    """`f1`, `precision` or `recall` of entities, or `accuracy` of tags, or a module of `evaluate`."""

    @property
    def column_types(self) -> dict[str, ColumnType]:
        """The columns with the words and the tags."""
        return {self.text[0]: WORDS, self.label: self.label_type}

    def label_names(self) -> list[str]:
        """Returns the tags in the order of their ids: the names of a `ClassLabel`, else those of train, `O` first."""
        rows = self.read("train")
        names = _names(rows, self.label)
        if names is None:
            names = sort_labels(tag for tags in rows[self.label][:] for tag in tags)
            names.sort(key=lambda name: name != OUTSIDE)
        return names

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[list[int]]:
        """Finds the tag ids of the words of each row.

        Raises:
            HfcompressError: if a row lacks an entry, has more or fewer tags than words, or a tag that the head does not
                have; and if the metric counts entities, but the tags have no names.
        """
        if self.metric != "accuracy" and OUTSIDE not in (labels or {}):
            raise HfcompressError(
                f"no tag is called {OUTSIDE}, so there are no entities to count "
                f"(the tags are {list_names(names_by_id(labels or {}))})",
                "name the tags (O, B-PER, I-PER, …), or set `metric: accuracy`",
            )
        names = _names(rows, self.label)
        find = make_label_finder(labels, names)
        found = []
        for number, (words, tags) in enumerate(zip(rows[self.text[0]][:], rows[self.label][:], strict=True)):
            self._require_words(number, words, tags)
            ids = [find(tag) for tag in tags]
            if -1 in ids:
                raise unknown_label_error(number, tags[ids.index(-1)], self.label, labels, names)
            found.append(ids)
        return found

    def label_warnings(self, targets: list[list[int]], labels: Mapping[str, int]) -> list[str]:
        """Warns of tags that no word of train has, and of tags that look alike."""
        return find_label_warnings({tag for tags in targets for tag in tags}, labels)

    def _require_words(self, number: int, words: Any, tags: Any) -> None:
        for column, values in ((self.text[0], words), (self.label, tags)):
            if None in values:
                raise HfcompressError(
                    f"row {number} has an entry that is missing in column '{column}'", "fix the row, or leave it out"
                )
        if len(words) != len(tags):
            raise HfcompressError(
                f"row {number} has {len(words)} words in column '{self.text[0]}' and {len(tags)} tags in column "
                f"'{self.label}'",
                "fix the row, or leave it out",
            )

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        changed = super().prepare_tokenizer(tokenizer)
        if not put_spaces_before_words(tokenizer):
            return changed
        info_once(
            f"{tokenizer.name_or_path}: its tokenizer puts no space before the first word; here words are read with a "
            "space, as in a text (add_prefix_space), and stages save the tokenizer with this setting"
        )
        return True

    def plain_texts(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> list[PlainText]:
        """Joins the words by spaces; leaves out rows whose text gives other tokens than the list of words."""
        texts = [" ".join(words) for words in rows[self.text[0]][:]]
        features = list(self.encode(rows, tokenizer, labels))
        read = tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"] if texts else []
        return [
            PlainText(number, (text,), feature)
            for number, (text, feature, ids) in enumerate(zip(texts, features, read, strict=True))
            if feature["input_ids"] == ids and len(ids) < self.max_length
        ]

    def encode(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> datasets.Dataset:
        import datasets

        names = sorted(labels or {}, key=(labels or {}).__getitem__)
        tags = datasets.Sequence(datasets.ClassLabel(names=names))
        words = rows.select_columns(self.text).add_column("tags", self.targets(rows, labels)).cast_column("tags", tags)

        def tokens(batch: Mapping[str, Any]) -> dict[str, Any]:
            encoded = tokenizer(
                batch[self.text[0]], is_split_into_words=True, truncation=True, max_length=self.max_length
            )
            aligned = [_align_labels(encoded.word_ids(row), tags) for row, tags in enumerate(batch["tags"])]
            return {
                **encoded,
                "length": [len(ids) for ids in encoded["input_ids"]],
                "labels": [labels for labels, _ in aligned],
                "words": [words for _, words in aligned],
            }

        return number_rows(map_batches(words, tokens, keep=("tags",)))

    def add_labels(
        self,
        tokens: dict[str, Tensor],
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        epoch: int | None,
    ) -> dict[str, Tensor]:
        """Adds labels `(rows, length)` to the batch, `IGNORED` at tokens that begin no word."""
        labels = pad_rows([feature["labels"] for feature in features], tokens["input_ids"].shape[1], IGNORED)
        return {**tokens, "labels": labels}

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy, the mean over words, weighted by the `weights` of their tags, `(tags,)`, if given."""
        return token_loss(logits, labels, weights)

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        import numpy as np

        rows = features.with_format(None)
        names = _names(rows, "tags") or []
        answers = np.split(outputs.argmax(-1), np.cumsum(rows["length"][:])[:-1])
        columns = [rows[name][:] for name in ("labels", "words", "tags")]
        predictions, references = [], []
        for found, labels, words, tags in zip(answers, *columns, strict=True):
            predicted = [MISSED] * len(tags)
            for word, answer in zip(words, found[np.array(labels) != IGNORED], strict=True):
                predicted[word] = names[answer]
            predictions.append(predicted)
            references.append([names[tag] for tag in tags])
        return object_array(predictions), object_array(references)

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """Gives every word the most frequent tag."""
        from collections import Counter

        counted = Counter(tag for tags in references for tag in tags)
        constant = counted.most_common(1)[0][0] if counted else OUTSIDE
        return object_array([[constant] * len(tags) for tags in references])


def _names(rows: datasets.Dataset, column: str) -> list[str] | None:
    """Returns the class names in a column of lists; None if it has none."""
    names = getattr(getattr(rows.features[column], "feature", None), "names", None)
    return list(names) if names else None


def _align_labels(word_ids: Sequence[int | None], targets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Returns the labels of a row by token, and the words whose first tokens have a label."""
    labels, words = [], []
    for place, word in enumerate(word_ids):
        first = word is not None and (place == 0 or word != word_ids[place - 1])
        labels.append(targets[word] if first and word is not None else IGNORED)
        words += [word] if first and word is not None else []
    return labels, words


def put_spaces_before_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Changes a tokenizer, in place, so that it reads a list of words as it reads a text; returns true if it changed.

    Byte-level tokenizers (RoBERTa's, ModernBERT's) know a word by the space before it, so the first word of a text
    needs a space too: `add_prefix_space`.

    Raises:
        HfcompressError: if the tokenizer does not know to which word a token belongs.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise HfcompressError(
            f"{type(tokenizer).__name__} does not know to which word a token belongs",
            "use a model with a fast tokenizer (a tokenizer.json)",
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not _set_prefix_space(state.get("pre_tokenizer")):
        return False
    fast: Any = tokenizer
    fast._tokenizer = Tokenizer.from_str(json.dumps(state))
    set_option(tokenizer, "add_prefix_space", True)  # some classes build their tokenizer from this when they load
    return True


def _set_prefix_space(step: Any) -> bool:
    """Turns on the prefix space in the state of a pre-tokenizer; returns true if it was off."""
    if not isinstance(step, dict):
        return False
    off = step.get("add_prefix_space") is False
    if off:
        step["add_prefix_space"] = True
    return any([off, *(_set_prefix_space(part) for part in step.get("pretokenizers", []))])
