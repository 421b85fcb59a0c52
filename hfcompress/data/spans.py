"""The task of extractive question answering: an answer is a span of a context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from hfcompress.data.evaluate_metric import AnyMetric
from hfcompress.data.metrics import SPANS, Metric, object_array
from hfcompress.data.task import IN_A_BATCH, LabelledTask, PlainText, Split, map_batches, number_rows
from hfcompress.data.values import ANSWER_FORM, ANSWERS, ColumnType, show_value
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]

Answers = tuple[list[str], list[int]]
"""The given answers, and the characters of the context where they start."""
CLS = 0
"""The position of the token that stands for "no answer here"."""


class QuestionAnswering(LabelledTask):
    """Finds the span of a context that answers a question.

    Rows have SQuAD's form: an answer is `{text: […], answer_start: […]}`. A context that does not fit into a window is
    split into several; each shares `stride` tokens with the one before. A long question is cut, so that the context
    gets at least half of the tokens that the overlap leaves free. The judged unit is the question.
    """

    head: ClassVar[str] = "span"
    purpose: ClassVar[str] = "finds the answer to a question in a text"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    pipeline: ClassVar[str | None] = None
    truncation: ClassVar[str | bool] = "only_second"
    outputs: ClassVar[int | None] = 2
    metrics: ClassVar[Mapping[str, Metric]] = SPANS
    label_type: ClassVar[ColumnType] = ANSWERS

    type: Literal["question-answering"] = "question-answering"
    text: list[str] = Field(default=["question", "context"], min_length=2, max_length=2)
    """The columns with the question and the context."""
    label: str = "answers"
    """The column with the answers."""
    max_length: int = Field(default=384, ge=16)
    """The number of tokens of a window, question included."""
    stride: int = Field(default=128, ge=0, validate_default=True)
    """The number of tokens that a window shares with the one before; at most half of `max_length`."""
    max_answer_length: int = Field(default=30, ge=1)
    """The most tokens that an answer may have."""
    n_best: int = Field(default=20, ge=1)
    """The number of best starts, and of best ends, that are combined in each window."""
    unanswerable: bool = False
    """Allow questions without an answer (SQuAD 2.0): the model learns from such rows, and may predict no answer."""
    metric: AnyMetric = "f1"
    """`f1` or `exact_match`, or a module of `evaluate`."""

    @field_validator("stride")
    @classmethod
    def _leaves_room(cls, stride: int, info: ValidationInfo) -> int:
        length = info.data.get("max_length")
        if length is not None and stride > length // 2:
            raise ValueError(f"stride is {stride}, more than half of max_length ({length})")
        return stride

    def label_names(self) -> list[str]:
        """Returns the names of the two outputs."""
        return ["start", "end"]

    def count_rows(self, split: Split = "train") -> None:
        """Returns None: the number of windows is known only after tokenization."""

    def head_labels(self) -> int:
        """Returns 2: start and end."""
        return 2

    def targets(self, rows: datasets.Dataset, labels: Mapping[str, int] | None) -> list[Answers]:
        """Returns the answers of each row.

        Raises:
            HfcompressError: if answers have another form, do not stand in the context, or are missing.
        """
        context = self.text[1]
        return [
            self._check_answers(number, text, given)
            for number, (text, given) in enumerate(zip(rows[context][:], rows[self.label][:], strict=True))
        ]

    def _check_answers(self, number: int, context: str, given: Mapping[str, Any]) -> Answers:
        texts, starts = given["text"], given["answer_start"]
        if texts is None or starts is None or len(texts) != len(starts) or None in (*texts, *starts):
            raise HfcompressError(f"row {number} has {show_value(given)} in column '{self.label}'", ANSWER_FORM)
        if not texts and not self.unanswerable:
            raise HfcompressError(
                f"row {number} has no answer in column '{self.label}'",
                "leave it out, or set `unanswerable: true` if questions may have no answer",
            )
        for text, start in zip(texts, starts, strict=True):
            if not text or start < 0 or context[start : start + len(text)] != text:
                raise HfcompressError(
                    f"row {number} has the answer {text!r} at character {start}, where the context has "
                    f"{context[max(start, 0) : max(start, 0) + max(len(text), 1)]!r}",
                    "fix answer_start; it counts characters from 0",
                )
        return texts, starts

    def encode(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> datasets.Dataset:
        """Tokenizes rows; each window becomes one row.

        Besides the columns of a batch, a window has `question` (the row's number), `context` and `answers`; and, of its
        context, `first` (the first token) and `offsets` (start and end characters of each token, flat).
        """
        self.targets(rows, labels)
        if not tokenizer.is_fast:
            raise HfcompressError(
                f"{type(tokenizer).__name__} does not know the characters of each token",
                "use a model with a fast tokenizer (a tokenizer.json)",
            )

        def windows(batch: Mapping[str, Any], numbers: list[int]) -> dict[str, Any]:
            contexts, answers = batch[self.text[1]], batch[self.label]
            encoded = tokenizer(
                self._shorten(batch[self.text[0]], tokenizer),
                contexts,
                truncation=self.truncation,
                max_length=self.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
            places = [_context_offsets(encoded.sequence_ids(window), offsets[window]) for window in range(len(rows))]
            return {
                **encoded,
                "length": [len(ids) for ids in encoded["input_ids"]],
                "labels": [_find_target(*place, answers[row]) for place, row in zip(places, rows, strict=True)],
                "first": [first for first, _ in places],
                "offsets": [[edge for pair in pairs for edge in pair] for _, pairs in places],
                "question": [numbers[row] for row in rows],
                "context": [contexts[row] for row in rows],
                "answers": [answers[row]["text"] or [""] for row in rows],
            }

        return number_rows(map_batches(rows.select_columns(self.columns), windows, with_indices=True))

    def plain_texts(
        self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None
    ) -> list[PlainText]:
        """Returns the questions and contexts that fit into one window."""
        questions, contexts = (list(rows[column]) for column in self.text)
        windows = self.encode(rows, tokenizer, labels).with_format(None)
        count = Counter(windows["question"][:])
        whole = [q == short for q, short in zip(questions, self._shorten(questions, tokenizer), strict=True)]
        return [
            PlainText(row, (questions[row], contexts[row]), {n: window[n] for n in IN_A_BATCH if n in window})
            for window in windows
            if whole[row := window["question"]] and count[row] == 1
        ]

    def _shorten(self, questions: list[str], tokenizer: Any) -> list[str]:
        room = self.max_length - tokenizer.num_special_tokens_to_add(pair=True) - self.stride
        limit = max(room // 2, 1)
        encoded = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
        ends = [pairs[limit - 1][1] if len(pairs) > limit else None for pairs in encoded["offset_mapping"]]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy over the tokens of a row, the mean over start and end and over rows.

        Args:
            logits: `(batch, length, 2)`.
            labels: `(batch, 2)`.
            mask: `(batch, length)`, true at real tokens; padding gets no probability.
        """
        from torch.nn import functional as F

        scores = logits.float()
        if mask is not None:
            scores = scores.masked_fill(~mask.bool().unsqueeze(-1), float("-inf"))
        return F.cross_entropy(scores, labels)

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        rows = features.with_format(None)
        best: dict[int, tuple[float, str]] = {}
        nothing: dict[int, float] = {}
        answers: dict[int, list[str]] = {}
        for row, window in zip(rows, _split_windows(outputs, rows["length"][:]), strict=True):
            question = row["question"]
            answers[question] = row["answers"]
            null = float(window[CLS].sum())
            nothing[question] = min(null, nothing.get(question, null))
            found = self._find_span(window, row["first"], row["offsets"], row["context"])
            if found is not None and (question not in best or found[0] > best[question][0]):
                best[question] = found
        predictions = []
        for question in answers:
            score, text = best.get(question, (float("-inf"), ""))
            predictions.append("" if self.unanswerable and nothing[question] > score else text)
        return object_array(predictions), object_array(list(answers.values()))

    def _find_span(self, window: Array, first: int, offsets: list[int], context: str) -> tuple[float, str] | None:
        count = len(offsets) // 2
        found = find_best_span(window[first : first + count], self.n_best, self.max_answer_length)
        if found is None:
            return None
        score, start, end = found
        return score, context[offsets[2 * start] : offsets[2 * end + 1]]

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """Gives no answer to any question."""
        return object_array([""] * len(references))


def find_best_span(scores: Array, n_best: int, longest: int) -> tuple[float, int, int] | None:
    """Finds the span whose start and end have the highest sum, among the `n_best` starts and ends.

    Args:
        scores: `(tokens, 2)`, start and end.
        n_best: The number of starts, and of ends, that are combined.
        longest: The most tokens that a span may have.

    Returns:
        The sum, the first and the last token; None if no span fits.
    """
    import numpy as np

    starts, ends = (np.argsort(-scores[:, i], kind="stable")[:n_best] for i in (0, 1))
    length = ends[None] - starts[:, None] + 1
    sums = np.where((length >= 1) & (length <= longest), scores[starts, 0][:, None] + scores[ends, 1][None], -np.inf)
    if not np.isfinite(sums).any():
        return None
    start, end = np.unravel_index(sums.argmax(), sums.shape)
    return float(sums[start, end]), int(starts[start]), int(ends[end])


def _split_windows(outputs: Array, lengths: list[int]) -> Iterator[Array]:
    start = 0
    for length in lengths:
        yield outputs[start : start + length]
        start += length


def _context_offsets(sequence_ids: list[int | None], offsets: list[Any]) -> tuple[int, list[tuple[int, int]]]:
    """Returns the first token of the context in a window, and the characters of each of its tokens."""
    places = [place for place, sequence in enumerate(sequence_ids) if sequence == 1]
    return (places[0] if places else CLS), [tuple(offsets[place]) for place in places]


def _find_target(first: int, offsets: list[tuple[int, int]], answers: Mapping[str, list[Any]]) -> list[int]:
    """Finds the first and last token of the first answer; `CLS` twice if the window does not hold all of it."""
    from bisect import bisect_left, bisect_right

    texts, starts = answers["text"], answers["answer_start"]
    if not texts or not offsets:
        return [CLS, CLS]
    begin, end = starts[0], starts[0] + len(texts[0])
    if begin < offsets[0][0] or end > offsets[-1][1]:
        return [CLS, CLS]
    start = bisect_right(offsets, begin, key=lambda pair: pair[0]) - 1
    return [first + start, first + bisect_left(offsets, end, key=lambda pair: pair[1])]
