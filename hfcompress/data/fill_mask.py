"""Words that are left out of raw text, to be found again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.data import source
from hfcompress.data.metrics import MASKED, Metric
from hfcompress.data.task import IGNORED, PlainText, Split, Task, number_rows, token_loss
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import SHORT, hash_pieces

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]

JUDGED_PROBABILITY = 0.15
"""What is masked where a model is judged that was trained on unmasked text."""
TEXTS = 1000
"""Documents that are tokenized together."""


class FillMask(Task):
    """A corpus of raw text, for general distillation and masked language modelling.

    In training, masks are drawn anew each epoch by a row's number and the epoch alone, so a resumed run, and one on
    more processes, sees the same; where a model is judged they are fixed. Without a dev split the last hundredth of
    the documents is held out of train (of a stream, its first documents). The judged unit is the row.

    Source: BERT, Devlin et al. 2019, arXiv:1810.04805, section 3.1; packing as in RoBERTa, Liu et al. 2019,
    arXiv:1907.11692 (FULL-SENTENCES).
    """

    head: ClassVar[str] = "mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    pipeline: ClassVar[str | None] = "fill-mask"
    by_token: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = MASKED
    required: ClassVar[tuple[Split, ...]] = ("train",)
    kinds: ClassVar[str] = "txt (one document a line), csv, tsv, jsonl or parquet"

    type: Literal["fill-mask"] = "fill-mask"
    text: list[str] = Field(default=["text"], min_length=1, max_length=1)
    """The column with a document; a .txt file has one a line, in the column `text`."""
    packed: bool = True
    """Join documents, a separator between them, and cut rows of `max_length` tokens; else a row is a document."""
    mask_probability: float = Field(default=0.15, ge=0, lt=1)
    """Share of the tokens that are asked for: 80% masked, 10% another token, 10% as they are. 0 trains on the text as
    it is (TinyBERT's general distillation)."""
    streaming: bool = False
    """Read train while it is used, for a corpus that is too large to be tokenized first; needs `max_steps`."""
    dev_rows: int = Field(default=1000, ge=1)
    """Documents to judge on, at most, where they stream or are held out of train."""
    metric: str = "accuracy"
    """accuracy or perplexity of the masked tokens."""

    @property
    def is_streamed(self) -> bool:
        return self.streaming

    @property
    def has_labels(self) -> bool:
        return self.mask_probability > 0

    def count_rows(self, split: Split = "train") -> None:
        """None: only tokens tell how many rows documents give."""

    def _dev_count(self, count: int) -> int:
        return min(max(count // 100, 1), self.dev_rows)

    def _find(self, split: Split) -> Any:
        if self.streaming:
            return self._stream(split)
        found = super()._find(split)
        if split == "test" or (split == "dev" and found is not None):
            return found
        train = found if split == "train" else super()._find("train")
        if train is None or (split == "train" and super()._find("dev") is not None):
            return train
        kept = len(train) - self._dev_count(len(train))
        return train.select(range(kept) if split == "train" else range(kept, len(train)))

    def _stream(self, split: Split) -> Any:
        import datasets

        own = self.table.stream(split)
        if split == "train":
            dev = self.table.stream("dev")
            return own.skip(self.dev_rows) if own is not None and dev is None else own
        if split == "dev" and own is None:
            own = self.table.stream("train")
        return None if own is None else datasets.Dataset.from_list(list(own.take(self.dev_rows)))

    def read(self, split: Split) -> Any:
        """The documents of a split; of a streamed train split, a stream of them.

        Raises:
            HfcompressError: where the split or the column is missing, or there is no document.
        """
        if not (self.streaming and split == "train"):
            return super().read(split)
        found = self._find("train")
        first = next(iter(found), None) if found is not None else None
        if first is None:
            raise HfcompressError(
                f"the train split of {self.dataset} has nothing to stream",
                f"give it more than the {self.dev_rows} documents that are held out (`dev_rows`)",
            )
        return found

    def _require_values(self, rows: Any, split: Split) -> None:
        """A document without text is skipped."""

    def fingerprint(self, judged: bool = False) -> str:
        """A hash of the documents; of a stream, of the dev documents and of what tells train from another.

        That is the commit of a Hub corpus; of a file its size and 64 pieces of it.
        """
        if judged or not self.streaming:
            return super().fingerprint(judged)
        return hash_pieces(self._spell_out_stream())[:SHORT]

    def _spell_out_stream(self) -> Iterator[str | bytes]:
        yield "\x1f".join(map(str, self.read("dev")[self.text[0]]))
        if not source.is_local(self.dataset):
            yield str(source.data_revision(self.dataset, self.config, streaming=True))
            return
        file = self.table.file("train")
        assert file is not None
        size = file.path.stat().st_size
        yield str(size)
        with file.path.open("rb") as stream:
            for piece in range(64):
                stream.seek(size * piece // 64)
                yield stream.read(1 << 16)

    def head_labels(self) -> None:
        """None: the outputs are the vocabulary."""

    def label_names(self) -> list[str]:
        """None: the outputs are the vocabulary."""
        return []

    def targets(self, rows: Any, labels: Mapping[str, int] | None) -> list[Any]:
        """None: the text is its own label."""
        return []

    def encode(self, rows: Any, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None) -> Any:
        """Rows of tokens; of a stream, a stream of them."""
        import datasets
        import numpy as np

        if tokenizer.mask_token_id is None:
            raise HfcompressError(
                f"{type(tokenizer).__name__} has no mask token", "use a model that was trained to fill masks"
            )
        made = {"rows": rows, "tokenizer": tokenizer}
        if isinstance(rows, datasets.IterableDataset):
            return datasets.IterableDataset.from_generator(self._features, gen_kwargs=made)
        ids = [np.array(row, dtype=np.int32) for row in self._token_rows(rows, tokenizer)]
        if not ids:
            raise HfcompressError(f"the documents of {self.dataset} are empty", "give it text")
        encoded = datasets.Dataset.from_dict({"input_ids": ids})
        return number_rows(encoded.add_column("length", [len(row) for row in ids]))

    def plain_texts(self, rows: Any, tokenizer: Any, labels: Mapping[str, int] | None) -> list[PlainText]:
        """The beginnings of documents, a word in the middle of them masked."""
        found = []
        for number, text in enumerate(rows[self.text[0]]):
            words = (text or "").split()[: max(self.max_length // 8, 1)]
            if not words:
                continue
            words[len(words) // 2] = tokenizer.mask_token
            features = tokenizer(" ".join(words), truncation=True, max_length=self.max_length)
            if features["input_ids"].count(tokenizer.mask_token_id) == 1:
                found.append(PlainText(number, (" ".join(words),), {**features, "index": number}))
        return found

    def _features(self, rows: Any, tokenizer: Any) -> Iterator[dict[str, Any]]:
        for index, ids in enumerate(self._token_rows(rows, tokenizer)):
            yield {"input_ids": ids, "length": len(ids), "index": index}

    def _token_rows(self, rows: Any, tokenizer: Any) -> Iterator[list[int]]:
        documents = (values[self.text[0]] for values in rows.select_columns(self.text).iter(TEXTS))
        texts = ([text for text in some if text and not text.isspace()] for some in documents)
        if not self.packed:
            for some in texts:
                yield from tokenizer(some, truncation=True, max_length=self.max_length)["input_ids"] if some else []
            return
        tokens = (tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"] for some in texts if some)
        yield from pack_documents(tokens, self.max_length, tokenizer.cls_token_id, tokenizer.sep_token_id)

    def add_labels(
        self,
        tokens: dict[str, Tensor],
        features: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        epoch: int | None,
    ) -> dict[str, Tensor]:
        """The batch with some tokens replaced, and in `labels` what was there."""
        import torch

        probability = self.mask_probability if epoch is not None else self.mask_probability or JUDGED_PROBABILITY
        ids, labels = mask_tokens(tokens["input_ids"].numpy(), tokens["index"].numpy(), tokenizer, probability, epoch)
        return {**tokens, "input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy, the mean over masked tokens; 0 where none is."""
        return token_loss(logits, labels)

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        return outputs[:, 1:], outputs[:, 0]

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """What the tokens' frequencies alone tell: always the most frequent token, or each by its share."""
        import numpy as np

        # What begins and ends a row, and parts its documents, is never asked for.
        rows = [np.asarray(ids) for ids in features["input_ids"][:]]
        tokens = np.concatenate([row[1:][row[1:] != row[-1]] for row in rows])
        _, counts = np.unique(tokens, return_counts=True)
        shares = counts / counts.sum()
        entropy = float(-(shares * np.log(shares)).sum())
        return references[:, None] * np.array([[shares.max(), entropy]])


def pack_documents(documents: Iterable[list[list[int]]], length: int, cls: int, sep: int) -> Iterator[list[int]]:
    """Documents joined, a separator after each, and cut: `[CLS] … [SEP]`, every block but the last full.

    Args:
        documents: Token ids, some documents at a time.
        length: Tokens of a block.
        cls, sep: What begins and ends one.
    """
    room, left = length - 2, list[int]()
    for some in documents:
        for ids in some:
            left += [*ids, sep] if ids else []
        full = len(left) - len(left) % room
        yield from ([cls, *left[start : start + room], sep] for start in range(0, full, room))
        left = left[full:]
    if len(left) > 1:  # the last separator ends the block
        yield [cls, *left[:-1], sep]


def mask_tokens(ids: Array, index: Array, tokenizer: Any, probability: float, epoch: int | None) -> tuple[Array, Array]:
    """Token ids with some replaced, and what was there: `IGNORED` where nothing is asked.

    Args:
        ids: `(rows, length)`.
        index: `(rows,)`: their numbers, which with `epoch` decide what is masked, whatever else is in the batch.
        tokenizer: Knows the mask and the special tokens, which are never masked.
        probability: Share of the tokens that are asked for.
        epoch: None for what is drawn alike each time.
    """
    import numpy as np

    asked, how, which = draw_uniforms(index, ids.shape[1], 0 if epoch is None else epoch + 1)
    chosen = (asked < probability) & ~np.isin(ids, list(tokenizer.all_special_ids))
    other = (which * len(tokenizer)).astype(ids.dtype)
    replaced = np.where(how < 0.8, tokenizer.mask_token_id, np.where(how < 0.9, other, ids))
    return np.where(chosen, replaced, ids), np.where(chosen, ids, IGNORED)


def draw_uniforms(index: Array, length: int, epoch: int) -> Array:
    """Three independent uniform numbers for each token, `(3, rows, length)`, from its row, place and epoch alone.

    Source: SplitMix64, Steele, Lea and Flood 2014, used as a hash: no state, so no order of rows matters.
    """
    import numpy as np

    step = np.uint64(0x9E3779B97F4A7C15)

    def mixed(x: Array) -> Array:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    rows = mixed(mixed(index.astype(np.uint64) * step) + np.uint64(epoch))
    places = mixed(rows[:, None] + np.arange(1, length + 1, dtype=np.uint64) * step)
    kinds = mixed(places[None] + np.arange(1, 4, dtype=np.uint64)[:, None, None] * step)
    return (kinds >> np.uint64(11)) * 2.0**-53
