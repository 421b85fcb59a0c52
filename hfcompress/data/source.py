"""Where models and data come from: a directory, the Hub, or the package itself (`builtin:quickstart`)."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.base.errors import HfcompressError
from hfcompress.model.artifact import read_config

if TYPE_CHECKING:
    import datasets

BUILTIN = "builtin:quickstart"
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
_MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.onnx"]


def cache_home() -> Path:
    """Where built-in models and data are written once: `HFCOMPRESS_HOME`, or the user's cache directory."""
    base = os.environ.get("HFCOMPRESS_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "hfcompress"
    return Path(base).expanduser()


def model_directory(spec: str) -> Path:
    """The local directory of a model, fetched from the Hub where `spec` is an id (`id@revision` picks a revision).

    Raises:
        HfcompressError: where it is neither a directory nor an id that can be reached.
    """
    if spec == BUILTIN:
        from hfcompress.data.quickstart import write_model

        return write_model(cache_home() / "quickstart-model")
    if Path(spec).expanduser().is_dir():
        return Path(spec).expanduser()
    _refuse_a_path(spec, "model")
    from huggingface_hub import snapshot_download

    repo, _, revision = spec.partition("@")
    with _hub_errors(spec, "model"):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=_MODEL_FILES))


def model_config(spec: str) -> dict[str, Any]:
    """The config.json of a model, without its weights.

    Raises:
        HfcompressError: where it cannot be read.
    """
    if spec == BUILTIN or Path(spec).expanduser().is_dir():
        return read_config(model_directory(spec))
    _refuse_a_path(spec, "model")
    from huggingface_hub import hf_hub_download

    repo, _, revision = spec.partition("@")
    with _hub_errors(spec, "model"):
        return read_config(Path(hf_hub_download(repo, "config.json", revision=revision or None)).parent)


def _refuse_a_path(spec: str, what: str) -> None:
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or not spec:
        raise HfcompressError(f"no such {what} directory: {spec}", "check the path; a Hub id looks like `user/name`")


class _hub_errors:  # noqa: N801  reads as a context, like contextlib's own
    """Turns the Hub client's errors into one that says what to do."""

    def __init__(self, spec: str, what: str) -> None:
        self.spec, self.what = spec, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if error is None or isinstance(error, (HfcompressError, KeyboardInterrupt)):
            return
        name = type(error).__name__
        reason = {
            "RepositoryNotFoundError": "the Hub knows no such repository (or it is private: `hf auth login`)",
            "GatedRepoError": "the repository is gated: accept its terms on the Hub, then `hf auth login`",
            "RevisionNotFoundError": "the repository has no such revision",
            "EntryNotFoundError": "the repository lacks a file that is needed",
            "HFValidationError": "that is no Hub id",
            "DatasetNotFoundError": "the Hub knows no such data set, and no such directory is here",
        }.get(name)
        if reason is None and not isinstance(error, (OSError, ValueError)) and "Hub" not in name:
            return
        raise HfcompressError(
            f"{self.what} '{self.spec}': {reason or 'it is not a local directory, and the Hub cannot be reached'}",
            f"give a local directory, or check the id and the connection ({name})",
        ) from error


def is_local(dataset: str) -> bool:
    """Whether a data set lies on this machine (or in the package)."""
    return dataset == BUILTIN or Path(dataset).expanduser().is_dir()


def split_file(dataset: str, split: str, splits: Mapping[str, str]) -> Path | None:
    """The file of one split of a local data set, or None.

    Args:
        dataset: A directory, or `builtin:quickstart`.
        split: `train`, `dev` or `test`.
        splits: Renamed splits, such as `{"dev": "heldout"}`.
    """
    folder = _local_folder(dataset)
    names = (splits[split],) if split in splits else SPLIT_NAMES[split]
    found = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    return next((path for path in found if path.is_file()), None)


def _local_folder(dataset: str) -> Path:
    if dataset == BUILTIN:
        from hfcompress.data.quickstart import write_dataset

        return write_dataset(cache_home() / "quickstart-data")
    return Path(dataset).expanduser()


def columns(path: Path) -> list[str]:
    """The column names of a data file, from its first line or its schema.

    Raises:
        HfcompressError: for an empty file or one that cannot be read.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(path).names)
    with path.open(encoding="utf-8", errors="replace") as stream:
        first = stream.readline().rstrip("\n\r")
    if not first:
        raise HfcompressError(f"{path} is empty", "a data file has a header line and at least one row")
    if path.suffix == ".tsv":
        return first.split("\t")
    if path.suffix == ".csv":
        return next(csv.reader([first]))
    import json

    try:
        row = json.loads(first)
    except json.JSONDecodeError as error:
        raise HfcompressError(f"{path}:1 is not JSON: {error}", "a .jsonl file holds one JSON object a line") from None
    return list(row) if isinstance(row, dict) else []


def read_split(dataset: str, config: str | None, split: str, splits: Mapping[str, str]) -> datasets.Dataset | None:
    """One split as a `datasets.Dataset`, or None where the data set has no such split.

    Raises:
        HfcompressError: where the data cannot be read.
    """
    if is_local(dataset):
        path = split_file(dataset, split, splits)
        return None if path is None else _read_file(path)
    _refuse_a_path(dataset, "data")
    import datasets

    names = (splits[split],) if split in splits else SPLIT_NAMES[split]
    with _hub_errors(dataset, "data set"):
        available = datasets.get_dataset_split_names(dataset, config)
        name = next((n for n in names if n in available), None)
        return None if name is None else datasets.load_dataset(dataset, config, split=name)


def _read_file(path: Path) -> datasets.Dataset:
    import datasets

    columns(path)
    try:
        if path.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(path))
        if path.suffix in (".jsonl", ".json"):
            return datasets.Dataset.from_json(str(path))
        return datasets.Dataset.from_pandas(_read_table(path), preserve_index=False)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise HfcompressError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _read_table(path: Path) -> Any:
    import pandas

    # A word such as "null" or "NA" is a text, not a missing value.
    quoting = {"sep": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"sep": ","}
    return pandas.read_csv(path, keep_default_na=False, encoding="utf-8", **quoting)
