"""The task of masked language modelling: some tokens of raw text are hidden, and the model predicts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.data import source
from hfcompress.data.metrics import MASKED, Metric
from hfcompress.data.task import IGNORED, PlainText, Split, Task, number_rows, token_loss
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import SHORT, hash_json, hash_pieces

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Array = NDArray[Any]

JUDGED_PROBABILITY = 0.15
"""The mask probability in evaluation of a task whose `mask_probability` is 0."""
MASKS = "philox"
"""The generator of the masks; a part of the fingerprint, so that no run goes on with other masks."""
TEXTS = 1000
"""The number of documents that are tokenized together."""


class FillMask(Task):
    """A corpus of raw text, for general distillation and masked language modelling.

    In training, each epoch draws new masks. They depend on the row's number and the epoch alone, so a resumed run, and
    a run on more processes, sees the same masks. In evaluation the masks are fixed. Without a dev split, the last
    hundredth of the documents is held out of train (of a stream, its first documents). The judged unit is the row.

    Source: BERT, Devlin et al. 2019, arXiv:1810.04805, section 3.1; packing as in RoBERTa, Liu et al. 2019,
    arXiv:1907.11692 (FULL-SENTENCES).
    """

    head: ClassVar[str] = "mask"
    purpose: ClassVar[str] = "predicts masked words"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    pipeline: ClassVar[str | None] = "fill-mask"
    by_token: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Metric]] = MASKED
    required: ClassVar[tuple[Split, ...]] = ("train",)
    kinds: ClassVar[str] = "txt (one document a line), csv, tsv, jsonl or parquet"

    type: Literal["fill-mask"] = "fill-mask"
    text: list[str] = Field(default=["text"], min_length=1, max_length=1)
    """The column with the document; a .txt file has one document on each line, in the column `text`."""
    packed: bool = True
    """Join the documents with a separator between them, and cut them into rows of `max_length` tokens; if false, a row
    is one document."""
    mask_probability: float = Field(default=0.15, ge=0, lt=1)
    """Share of the tokens that the model predicts: 80% of these are replaced by the mask token, 10% by another token,
    and 10% stay. 0 trains on the text as it is (TinyBERT's general distillation)."""
    streaming: bool = False
    """Read the train split while training, for a corpus that is too large to be tokenized first; needs `max_steps`."""
    dev_rows: int = Field(default=1000, ge=1)
    """The most documents to evaluate on, if they come from a stream or are held out of train."""
    metric: str = "accuracy"
    """`accuracy` or `perplexity` of the masked tokens."""

    @property
    def is_streamed(self) -> bool:
        return self.streaming

    @property
    def has_labels(self) -> bool:
        return self.mask_probability > 0

    def count_rows(self, split: Split = "train") -> None:
        """Returns None: the number of rows is known only after tokenization."""

    def _dev_count(self, count: int) -> int:
        return min(max(count // 100, 1), self.dev_rows)

    def _move_rows(self, split: Split, rows: Any) -> Any:
        """Moves nothing: `_find` holds out `dev_rows` documents itself."""
        return rows

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
        """Reads the documents of a split; with `streaming`, returns a stream of the train split.

        Raises:
            HfcompressError: if the split or the column is missing, or there is no document.
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
        """Accepts documents without text: `encode` skips them."""

    def fingerprint(self, judged: bool = False) -> str:
        """Hashes the documents and how masks are drawn.

        A stream is not read to its end: of its train split, the commit of a Hub corpus is hashed, or the size and 64
        pieces of a file.
        """
        streams = self.streaming and not judged
        documents = hash_pieces(self._spell_out_stream())[:SHORT] if streams else super().fingerprint(judged)
        return hash_json([documents, MASKS])

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
        """Returns None: the outputs are the vocabulary."""

    def label_names(self) -> list[str]:
        """Returns no names: the outputs are the vocabulary."""
        return []

    def targets(self, rows: Any, labels: Mapping[str, int] | None) -> list[Any]:
        """Returns no targets: the text is its own label."""
        return []

    def encode(self, rows: Any, tokenizer: PreTrainedTokenizerBase, labels: Mapping[str, int] | None) -> Any:
        """Tokenizes documents into rows; a stream becomes a stream of rows."""
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
        """Cuts each document to its first words, and masks the word in the middle of them."""
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
        """Replaces some tokens of the batch; `labels` holds the original ones."""
        import torch

        probability = self.mask_probability if epoch is not None else self.mask_probability or JUDGED_PROBABILITY
        ids, labels = mask_tokens(tokens["input_ids"].numpy(), tokens["index"].numpy(), tokenizer, probability, epoch)
        return {**tokens, "input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def loss(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Cross-entropy, the mean over masked tokens; 0 if there are none."""
        return token_loss(logits, labels)

    def judge(self, outputs: Array, features: datasets.Dataset) -> tuple[Array, Array]:
        return outputs[:, 1:], outputs[:, 0]

    def answer_blindly(self, references: Array, features: datasets.Dataset) -> Array:
        """Predicts by the frequencies of tokens alone: the most frequent token, or each token with its share."""
        import numpy as np

        # The tokens that begin and end a row, and separate its documents, are never masked.
        rows = [np.asarray(ids) for ids in features["input_ids"][:]]
        tokens = np.concatenate([row[1:][row[1:] != row[-1]] for row in rows])
        _, counts = np.unique(tokens, return_counts=True)
        shares = counts / counts.sum()
        entropy = float(-(shares * np.log(shares)).sum())
        return references[:, None] * np.array([[shares.max(), entropy]])


def pack_documents(documents: Iterable[list[list[int]]], length: int, cls: int, sep: int) -> Iterator[list[int]]:
    """Joins documents, a separator after each, and cuts them into blocks `[CLS] … [SEP]`; all but the last are full.

    Args:
        documents: Token ids, several documents at a time.
        length: The number of tokens of a block.
        cls, sep: The ids of the tokens that begin and end a block.
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
    """Replaces some tokens as BERT does.

    Args:
        ids: Token ids `(rows, length)`.
        index: The numbers of the rows, `(rows,)`; with `epoch`, they alone decide what is masked.
        tokenizer: Knows the mask token, and the special tokens, which are never masked.
        probability: Share of the tokens that the model predicts.
        epoch: None for fixed masks.

    Returns:
        The new ids, and the labels: the original ids of the tokens to predict, `IGNORED` elsewhere.
    """
    import numpy as np

    draw, kind, token = draw_uniforms(index, ids.shape[1], 0 if epoch is None else epoch + 1)
    chosen = (draw < probability) & ~np.isin(ids, list(tokenizer.all_special_ids))
    other = (token * len(tokenizer)).astype(ids.dtype)
    replaced = np.where(kind < 0.8, tokenizer.mask_token_id, np.where(kind < 0.9, other, ids))
    return np.where(chosen, replaced, ids), np.where(chosen, ids, IGNORED)


def draw_uniforms(index: Array, length: int, epoch: int) -> Array:
    """Draws three independent uniform numbers from [0, 1) for each token, `(3, rows, length)`.

    The numbers of a token depend on its row's number, its place in the row and the epoch alone: not on the batch, its
    padding, the process, or the rows before.

    Source: Philox, a generator whose state is a counter: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers:
    as easy as 1, 2, 3".
    """
    import numpy as np

    # The first word of the counter counts the draws of a row; places come first, so that padding changes no number.
    generators = (np.random.Generator(np.random.Philox(key=0, counter=[0, row, epoch, 0])) for row in index)
    return np.stack([generator.random((length, 3)) for generator in generators]).transpose(2, 0, 1)
