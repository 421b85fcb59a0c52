"""The judged rows as one model reads them, in batches: as they are, or made to have an exact length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.measure.process import Batch
from hfcompress.utils.errors import HfcompressError, Problem

if TYPE_CHECKING:
    import datasets

    from hfcompress.data.task import Task

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_ENDS = ("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id")
"""The special tokens that a row may begin or end with."""


class Rows:
    """The judged rows, encoded with one model's tokenizer."""

    def __init__(self, task: Task, tokenizer: Any, rows: datasets.Dataset, labels: Mapping[str, int]) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.encoded: datasets.Dataset = task.encode(rows, tokenizer, labels)

    def batches(self, groups: Iterable[Sequence[int]], names: Sequence[str] = TOKENS) -> Iterator[Batch]:
        """Makes a batch of arrays from each group of rows, padded to the longest row of the group."""
        for group in groups:
            batch = self.task.batch(self.encoded.__getitems__(list(group)), self.tokenizer)
            yield {name: batch[name].numpy() for name in names if name in batch}

    def exact_batches(self, groups: Iterable[Sequence[int]], length: int) -> Iterator[Batch]:
        """Makes a batch from each group of rows, in which each row has an exact length and no padding.

        A row keeps the special tokens at its beginning and its end. What is between them is cut at the end, or followed
        by the same part of the next rows of the data, until the row has `length` tokens. Appended tokens have the token
        type of the last token before them.
        """
        import numpy as np

        for group in groups:
            rows = [self._make_exact(number, length) for number in group]
            yield {name: np.array([row[name] for row in rows], np.int64) for name in rows[0]}

    def _make_exact(self, number: int, length: int) -> dict[str, list[int]]:
        encoded = self.encoded.with_format(None)
        row = encoded[number]
        ids, (begin, end) = list(row["input_ids"]), self._find_body(row["input_ids"])
        body, room = ids[begin:end], length - begin - (len(ids) - end)
        for offset in range(1, len(encoded) + 1):
            if len(body) >= room:
                break
            other = encoded[(number + offset) % len(encoded)]["input_ids"]
            body += other[slice(*self._find_body(other))]
        if not body:
            raise HfcompressError("no judged row has a token, so no rows of an exact length can be made of them")
        body = (body * (room // len(body) + 1))[:room]
        made = {"input_ids": [*ids[:begin], *body, *ids[end:]], "attention_mask": [1] * length}
        if "token_type_ids" in row:
            types = list(row["token_type_ids"])
            own = types[begin:end] or types[:1]
            filled = (own + own[-1:] * room)[:room]
            made["token_type_ids"] = [*types[:begin], *filled, *types[end:]]
        return made

    def _find_body(self, ids: Sequence[int]) -> tuple[int, int]:
        """Finds where the part between the special tokens at the beginning and at the end begins and ends.

        A row of special tokens alone keeps the last of several at its end.
        """
        special = {getattr(self.tokenizer, name, None) for name in _ENDS}
        begin = next((n for n, token in enumerate(ids) if token not in special), None)
        if begin is None:
            return (max(len(ids) - 1, min(len(ids), 1)),) * 2
        end = next((n for n in range(len(ids), begin, -1) if ids[n - 1] not in special), begin)
        return begin, end


def find_length_problems(lengths: Sequence[int], longest: int, why: str = "task.max_length is") -> list[Problem]:
    """Finds the lengths of `measure.latency.lengths` that are more than the longest that is possible, in tokens."""
    return [
        Problem(
            f"rows of {length} tokens cannot be timed: {why} {longest}",
            f"set it to {longest} or less",
            ("measure", "latency", "lengths", index),
        )
        for index, length in enumerate(lengths)
        if length > longest
    ]
