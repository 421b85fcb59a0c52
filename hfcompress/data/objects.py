"""Writes data sets and models from memory to directories that recipes can name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import cache_home
from hfcompress.models.artifact import save_model
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import SHORT, hash_json, hash_pieces
from hfcompress.utils.lock import shared_directory

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEV_SHARE = 0.1
"""Share of a data set without splits that becomes the dev split."""
_SPLITS = {"train": "train", "validation": "dev", "dev": "dev", "test": "test"}


def save_dataset(rows: Any) -> str:
    """Writes a data set of the `datasets` library to files, and returns their directory.

    The directory is named by the content, so the same rows are written once. Class labels are written as names.

    Args:
        rows: A `DatasetDict`, or a mapping with the splits `train`, `validation` (or `dev`) and `test`; or a single
            `Dataset`, of which a tenth, drawn with a fixed seed, becomes the dev split.

    Raises:
        HfcompressError: if it is something else, or has other splits.
    """
    splits = _splits_of(rows)
    identity = {name: [_hash_rows(split), split.features.to_dict()] for name, split in splits.items()}
    directory = cache_home() / "objects" / f"data-{hash_json(identity)}"
    if not directory.exists():
        with shared_directory(directory) as scratch:
            for name, split in splits.items():
                split.to_parquet(str(scratch / f"{name}.parquet"))
    return str(directory)


def _splits_of(rows: Any) -> dict[str, datasets.Dataset]:
    import datasets

    if isinstance(rows, datasets.Dataset):
        parts = rows.train_test_split(test_size=DEV_SHARE, seed=0)
        rows = {"train": parts["train"], "dev": parts["test"]}
    if not isinstance(rows, Mapping) or not all(isinstance(split, datasets.Dataset) for split in rows.values()):
        raise HfcompressError(
            f"a data set is a name, a directory, or a Dataset or DatasetDict of `datasets`, not {type(rows).__name__}",
            "for a streamed data set, give its Hub id",
        )
    unknown = sorted(set(map(str, rows)) - set(_SPLITS))
    if unknown:
        raise HfcompressError(
            f"the data set has a split '{unknown[0]}'; the splits are train, validation and test",
            "name the splits so, such as DatasetDict(train=…, validation=…)",
        )
    return {_SPLITS[name]: spell_class_names(split) for name, split in rows.items()}


def spell_class_names(rows: datasets.Dataset) -> datasets.Dataset:
    """Replaces the ids of class labels by their names; -1, which stands for no label, has none."""
    import datasets

    for column, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            names = [None if i is None or i < 0 else feature.int2str(i) for i in rows[column]]
            rows = rows.remove_columns(column).add_column(column, names)
    return rows


def _hash_rows(rows: datasets.Dataset) -> str:
    """Hashes the values of the rows; a fingerprint of `datasets` depends on how the rows were made."""
    batches = rows.with_format("arrow").iter(batch_size=1000)
    return hash_pieces(repr(column) for batch in batches for column in batch.to_pydict().items())


def save_model_object(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes a model and its tokenizer to a directory that is named by their content, and returns it."""
    directory = cache_home() / "objects" / f"model-{hash_pieces(_spell_out_model(model, tokenizer))[:SHORT]}"
    complete = directory / "tokenizer_config.json"
    if not complete.exists():
        with shared_directory(directory) as scratch:
            save_model(model, tokenizer, scratch)
    return str(directory)


def _spell_out_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | memoryview]:
    import torch

    yield f"{type(model).__name__} {model.config.to_json_string()} {_spell_out_tokenizer(tokenizer)}"
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        yield f"{name} {values.dtype} {tuple(values.shape)}"
        yield values.flatten().view(torch.uint8).numpy().data


def _spell_out_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Writes a tokenizer as text: its vocabulary and rules if it is a fast one."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return f"{tokenizer!r} {inner.to_str() if inner is not None else sorted(tokenizer.get_vocab().items())}"
