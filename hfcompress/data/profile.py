"""Looks at a data set as somebody does who wants to train on it: columns, classes, lengths, duplicates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfcompress.data.objects import spell_class_names
from hfcompress.data.split import normalize
from hfcompress.data.values import Number, show_value
from hfcompress.utils.errors import HfcompressError, did_you_mean
from hfcompress.utils.wording import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfcompress.data.task import Task

SAMPLE = 2000
"""Rows that columns are guessed from."""
MAX_CLASSES = 100
"""A column of whole numbers with more different values than this holds scores, not classes."""
RARE = 0.2
"""A class with less than this share of an equal share is rare: accuracy hardly sees it."""
FEW = 10
"""Rows of a class that are too few to learn it from, and to split."""
TOKENIZED = 5000
"""Rows whose tokens are counted."""
TEXT_NAMES = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"),
    ("question", "context"), ("question", "sentence"), ("query", "passage"), ("text",), ("sentence",), ("tokens",),
    ("words",), ("review",), ("content",), ("comment",), ("message",), ("title",), ("question",),
)  # fmt: skip
"""Columns that usually hold the text or the two texts of a row, the surest first."""
LABEL_NAMES = (
    "label", "labels", "class", "category", "target", "sentiment", "intent", "stars", "rating", "score", "similarity",
    "ner_tags", "pos_tags", "tags", "answers", "y",
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The columns of a task, and the type of the task that they fit.

    Attributes:
        type: The `type:` of a task.
        text: One or two columns.
        label: The column with the label; None for raw text.
    """

    type: str
    text: tuple[str, ...]
    label: str | None


@dataclass(frozen=True)
class Profile:
    """The facts of a data set that decide how to train on it and how far a result can be believed.

    Attributes:
        rows: By split, its number of rows.
        classes: By class, its rows in the train split; empty if there are no classes.
        lengths: The token counts of rows of the train split, in rising order; empty if there was no tokenizer.
        leaks: By split other than train, how many of its rows have a text that train has too.
        duplicates: Rows of train whose text stands there before.
        conflicts: Texts of train that have more than one label.
        seen_in_dev: Rows of test whose text dev has too, and train has not.
    """

    rows: Mapping[str, int]
    classes: Mapping[str, int] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    leaks: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    conflicts: int = 0
    seen_in_dev: int = 0

    @property
    def rare_classes(self) -> list[str]:
        """The classes that accuracy hardly sees."""
        even = sum(self.classes.values()) / max(len(self.classes), 1)
        return [name for name, rows in self.classes.items() if rows < RARE * even]

    def length_of(self, share: float) -> int:
        """Finds the number of tokens that a share of the rows does not exceed."""
        return int(self.lengths[min(math.ceil(share * len(self.lengths)), len(self.lengths)) - 1])

    def describe(self) -> list[str]:
        """Lists the facts, a sentence each."""
        found = ["rows: " + ", ".join(f"{rows:,} in {split}" for split, rows in self.rows.items())]
        if self.classes:
            found.append(f"{len(self.classes)} classes: {self._describe_classes()}")
        if self.lengths:
            found.append(
                f"tokens in a row: median {self.length_of(0.5)}, 99th percentile {self.length_of(0.99)}, "
                f"longest {self.lengths[-1]}"
            )
        return found

    def _describe_classes(self) -> str:
        total = sum(self.classes.values())
        told = [
            f"{show_value(name)} ({rows / total:.1%})"
            for name, rows in sorted(self.classes.items(), key=lambda item: -item[1])
        ]
        return ", ".join(told) if len(told) <= 8 else f"from {told[0]} to {told[-1]}"

    def warnings(self) -> list[str]:
        """Lists what makes a result worse or less believable, and what to do about it."""
        found = [
            f"{count(rows, 'row')} of {self.rows[split]:,} in {split} {'has' if rows == 1 else 'have'} a text of train"
            f", so the {split} score may be too high; leave them out of train"
            for split, rows in self.leaks.items()
            if rows
        ]
        if self.seen_in_dev:
            has = "has" if self.seen_in_dev == 1 else "have"
            found.append(
                f"{count(self.seen_in_dev, 'row')} of {self.rows['test']:,} in test {has} a text of dev, by which "
                "models are chosen; leave them out of dev"
            )
        if self.conflicts:
            has = "has" if self.conflicts == 1 else "have"
            found.append(f"{count(self.conflicts, 'text')} of train {has} more than one label; correct them")
        if self.duplicates:
            repeat = "repeats" if self.duplicates == 1 else "repeat"
            found.append(f"{count(self.duplicates, 'row')} of train {repeat} an earlier text")
        if self.rare_classes:
            found.append(
                f"rare classes: {_list_some(self.rare_classes)}; accuracy hardly sees them, and compression "
                "breaks them first"
            )
        if few := [name for name, rows in self.classes.items() if rows < FEW]:
            found.append(
                f"fewer than {FEW} rows of train for {_list_some(few)}: too few to learn or to judge a class by"
            )
        return found


def _list_some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(show_value, names[:5])) + rest


def guess_columns(
    samples: Sequence[Mapping[str, Any]], text: Sequence[str] = (), label: str | None = None, type: str | None = None
) -> Columns:
    """Guesses from some rows which columns hold text and label, and what kind of task they make.

    Args:
        samples: Rows, as they stand in the file.
        text, label, type: What is known already.

    Raises:
        HfcompressError: if a named column is not there, or none looks like the one that is sought.
    """
    if not samples:
        raise HfcompressError("the data has no rows", "give it at least ten")
    names = list(dict.fromkeys(name for row in samples for name in row))
    _require_table(names, samples)
    if len(text) > 2:
        raise HfcompressError(f"{len(text)} columns of text are named", "a task reads one, or two that make a pair")
    for name in (*text, *([label] if label else [])):
        if name not in names:
            raise HfcompressError(f"the data has no column '{name}'", did_you_mean(name, names))
    if label is None:
        label = _guess_label([name for name in names if name not in text], samples)
        if label is not None and any(row.get(label) == label for row in samples):
            raise HfcompressError(
                f"the column '{label}' also holds the value '{label}': the first line looks like a row, not a header",
                "begin the file with a line of column names, such as text,label",
            )
    text = tuple(text) or _guess_text([name for name in names if name != label], samples)
    type = type or _guess_type(samples, text, label)
    values = {str(row.get(label)) for row in samples} if label and type == "text-classification" else set()
    if len(values) > max(len(samples) / 2, FEW):
        raise HfcompressError(
            f"the column '{label}' has {len(values)} different values in {len(samples)} rows, which are no classes",
            "name the column of the label with --label, or another type with --task",
        )
    return Columns(type, text, label)


def _require_table(names: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a file whose columns were not told apart, or that is one nested object."""
    separators = [mark for mark in (";", "\t", "|", ",") if mark in names[0]]
    if len(names) == 1 and separators:
        raise HfcompressError(
            f"the header is one column, {names[0]!r}: its columns seem to be separated by {separators[0]!r}",
            "save the file with commas as .csv, or with tabs as .tsv",
        )
    for name, value in samples[0].items():
        if len(samples) == 1 and isinstance(value, list) and value and isinstance(value[0], Mapping):
            raise HfcompressError(
                f"the data is one object with a list '{name}', not a list of rows",
                'write one row a line as .jsonl, such as {"question": …, "context": …, "answers": …}',
            )


def _guess_label(names: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The column with a usual name, else the one with the fewest values that repeat."""
    known = {name.casefold(): name for name in names}
    for usual in LABEL_NAMES:
        if usual in known:
            return known[usual]
    counted = {name: len({str(row.get(name)) for row in samples}) for name in names}
    repeated = {name: n for name, n in counted.items() if 2 <= n <= max(len(samples) // 5, 2)}
    return min(repeated, key=repeated.__getitem__) if repeated and len(names) > 1 else None


def _guess_text(names: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns with a usual name, else the one with the longest texts."""
    known = {name.casefold(): name for name in names}
    for usual in TEXT_NAMES:
        if all(name in known for name in usual):
            return tuple(known[name] for name in usual)
    lengths = {
        name: sum(len(str(row.get(name) or "").split()) for row in samples) / len(samples)
        for name in names
        if all(
            isinstance(row.get(name), str | list | None) and not isinstance(row.get(name), Number) for row in samples
        )
    }
    if not lengths:
        raise HfcompressError(
            "no column of the data looks like text", f"name it with --text; there are: {', '.join(names)}"
        )
    return (max(lengths, key=lengths.__getitem__),)


def _guess_type(samples: Sequence[Mapping[str, Any]], text: Sequence[str], label: str | None) -> str:
    if label is None:
        return "fill-mask"
    values = [row.get(label) for row in samples]
    if any(isinstance(value, Mapping) for value in values):
        return "question-answering"
    if any(isinstance(value, list) for value in values):
        return "token-classification"
    return "regression" if _are_scores([str(value) for value in values if value is not None]) else "text-classification"


def _are_scores(values: Sequence[str]) -> bool:
    """True for numbers of which some are fractions, or of which there are too many to be classes."""
    try:
        numbers = {float(value) for value in values}
    except ValueError:
        return False
    fractions = any(number != int(number) for number in numbers if math.isfinite(number))
    return (fractions and len(numbers) > 2) or len(numbers) > MAX_CLASSES


def profile(task: Task, tokenizer: PreTrainedTokenizerBase | None) -> Profile:
    """Counts rows, classes, tokens and duplicates of a task's splits.

    Args:
        task: The task; its columns are read.
        tokenizer: Counts the tokens, if there is one.

    Raises:
        HfcompressError: for data that cannot be read.
    """
    texts: dict[str, list[str]] = {}
    labels: list[str] = []
    for split in ("train", "dev", "test"):
        if split in task.required or task.table.read(split) is not None:
            rows = task.read(split)
            texts[split] = _join_columns(rows, task.text)
            if split == "train" and hasattr(task, "label") and task.type != "question-answering":
                labels = [str(value) for value in spell_class_names(rows)[task.label][:]]
    train = [normalize(text) for text in texts["train"]]
    known = set(train)
    others = {split: [normalize(text) for text in found] for split, found in texts.items() if split != "train"}
    leaks = {split: sum(text in known for text in found) for split, found in others.items()}
    dev = {*others.get("dev", ())} - known
    seen_in_dev = sum(text in dev for text in others.get("test", ()))
    pairs = set(zip(train, labels, strict=True)) if labels else set()
    conflicts = sum(n > 1 for n in Counter(text for text, _ in pairs).values())
    names = Counter(labels) if task.type == "text-classification" else {}
    lengths = _count_tokens(texts["train"], tokenizer) if tokenizer is not None else []
    return Profile(
        {split: len(found) for split, found in texts.items()},
        dict(names), lengths, leaks, len(train) - len(known), conflicts, seen_in_dev,
    )  # fmt: skip


def _join_columns(rows: Any, columns: Sequence[str]) -> list[str]:
    values = [rows[column][:] for column in columns]
    return ["\n".join(" ".join(v) if isinstance(v, list) else v for v in row) for row in zip(*values, strict=True)]


def _count_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    step = max(len(texts) // TOKENIZED, 1)
    encoded = tokenizer(list(texts[::step]), truncation=False, verbose=False)["input_ids"]
    return sorted(len(ids) for ids in encoded)
