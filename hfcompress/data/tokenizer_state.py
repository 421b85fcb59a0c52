"""Describes how a tokenizer reads texts, and compares it with other tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hfcompress.data.task import IN_A_BATCH
from hfcompress.utils.hashing import hash_pieces

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_SET_BY_EACH_CALL = ("padding", "truncation")
_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""The options that name the files of a tokenizer; they do not change what it does."""


def vocabulary_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the meaning of each id: the vocabulary, the special tokens and the padding."""
    return {
        "vocabulary": tokenizer.get_vocab(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "pad_type": getattr(tokenizer, "pad_token_type_id", 0),
    }


def splitting_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns everything that decides which ids a tokenizer gives a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        options = {name: str(value) for name, value in tokenizer.init_kwargs.items() if name not in _PLACES}
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "options": options}
    else:
        state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in _SET_BY_EACH_CALL}
    return {**vocabulary_state(tokenizer), "state": state, "cut": tokenizer.truncation_side}


def input_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns, as JSON, everything that decides which inputs a model with this tokenizer gets."""
    return {**splitting_state(tokenizer), "inputs": list(tokenizer.model_input_names)}


def hash_inputs(rows: datasets.Dataset) -> str:
    """Hashes the inputs of a model in encoded rows, column by column, in their order; labels are left out."""
    return hash_pieces(_spell_out(rows))


def _spell_out(rows: datasets.Dataset) -> Iterator[str | bytes]:
    import numpy as np
    import pyarrow as pa

    for name in sorted({*rows.column_names} & {*IN_A_BATCH} - {"labels"}):
        yield f"{name}\x1f"
        for table in rows.select_columns([name]).with_format("arrow").iter(4096):
            for chunk in table.column(name).chunks:
                nested = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
                values = (chunk.flatten() if nested else chunk).to_numpy(zero_copy_only=False)
                yield values.astype(np.int64).tobytes()


def split_alike(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, rows: datasets.Dataset, others: datasets.Dataset
) -> bool:
    """True if two tokenizers split the same rows into the same tokens; their ids may differ.

    Args:
        one, other: The tokenizers.
        rows, others: The same rows, encoded with each tokenizer.
    """
    import numpy as np

    if rows["length"][:] != others["length"][:]:
        return False
    known, vocabulary = other.get_vocab(), one.get_vocab()
    ids = np.full(max(vocabulary.values()) + 1, -1)
    for token, index in vocabulary.items():
        ids[index] = known.get(token, -1)
    pairs = zip(
        rows.select_columns(["input_ids"]).iter(4096), others.select_columns(["input_ids"]).iter(4096), strict=True
    )
    return all(
        np.array_equal(ids[np.concatenate(mine["input_ids"])], np.concatenate(theirs["input_ids"]))
        for mine, theirs in pairs
    )
