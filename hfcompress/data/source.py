"""Finds models and data: in a directory, on the Hub, or in the package itself (`builtin:quickstart`)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.files import DataFile, data_file, require_columns
from hfcompress.data.hub import OFFLINE, first_line, hub_calls
from hfcompress.data.values import ColumnType, convert_columns, features_of, read_column
from hfcompress.models.artifact import MODELING_FILE, Artifact, log_graph_choice, open_artifact, read_config
from hfcompress.models.weights import (
    PICKLED,
    choose,
    external_files,
    names_in,
    read_headers,
    torch_dtype,
    weight_files,
)
from hfcompress.utils.card_metadata import require_hub_id
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.hashing import hash_file
from hfcompress.utils.places import is_directory, is_file, local_path

if TYPE_CHECKING:
    import datasets

BUILTIN = "builtin:quickstart"
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation"), "test": ("test",)}
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".txt")
_BESIDE_THE_WEIGHTS = ["config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "*.txt",
                       "*.model", "*.codes", MODELING_FILE]  # fmt: skip
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
_ONNX = ["*.onnx", "*.onnx_data*", "*.onnx.data"]
_IN_A_FOLDER = ["*/*"]
_COMMIT = r"[0-9a-f]{40}"


def cache_home() -> Path:
    """Returns the cache directory of hfcompress: `HFCOMPRESS_HOME`, or a folder in the user's cache directory."""
    base = os.environ.get("HFCOMPRESS_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "hfcompress"
    return Path(base).expanduser()


def _builtin_home() -> Path:
    """Returns the directory of the built-in model and data; each edition of them has its own."""
    edition = hash_file(Path(__file__).with_name("quickstart.py"))[:12]
    return cache_home() / f"quickstart-{edition}"


def model_directory(spec: str) -> Path:
    """Returns the directory of a model; fetches it from the Hub if `spec` is an id (`id@revision` picks a revision).

    Raises:
        HfcompressError: if `spec` is neither a directory nor an id that can be fetched.
    """
    place, graph = split_graph(spec)
    if graph:
        raise HfcompressError(
            f"'{spec}' names a graph, which can be measured, but not trained",
            f"a graph is for `evaluate`; a recipe needs the weights: {place}",
        )
    return _directory(place)


def open_model(spec: str, stage: str = "source", kind: str | None = None) -> Artifact:
    """Opens the model of a directory or Hub id, or one of its graphs: `DIR:FILE.onnx`, `user/name:onnx/FILE.onnx`.

    Raises:
        HfcompressError: if it cannot be fetched or opened.
    """
    place, graph = split_graph(spec)
    return open_artifact(_directory(place, graph), stage, kind, graph)


def split_graph(spec: str) -> tuple[str, str]:
    """Splits a model's name into its directory or Hub id, and the graph after the colon; empty if there is none."""
    place, colon, graph = spec.rpartition(":")
    named = colon and graph.endswith((".onnx", ".xml")) and not is_directory(spec)
    return (place, graph.removeprefix("./")) if named else (spec, "")


def _directory(spec: str, graph: str = "") -> Path:
    if spec == BUILTIN:
        from hfcompress.data.quickstart import write_model

        return write_model(_builtin_home() / "model")
    if is_directory(spec):
        return local_path(spec)
    refuse_a_path(spec, "model")
    # A repository often holds its weights in several formats (onnx/, openvino/ and others): one format is fetched.
    if graph:
        return _graph_snapshot(spec, graph)
    folder = _snapshot(spec, _BESIDE_THE_WEIGHTS + _SAFETENSORS, _IN_A_FOLDER)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(spec, _BESIDE_THE_WEIGHTS + _ONNX, _IN_A_FOLDER)
    if any(folder.glob("*.onnx")) or any(folder.glob("*.safetensors")):
        return folder
    names = _list_files(spec) or names_in(folder)
    if _is_offline() and not any(name.endswith((".onnx", ".xml")) for name in names):
        raise HfcompressError(f"model '{spec}': the cache holds only a part of it", OFFLINE)
    chosen = choose(names, spec)
    log_graph_choice(spec, chosen)
    return _graph_snapshot(spec, chosen.file)


def _graph_snapshot(spec: str, graph: str) -> Path:
    """Fetches a graph of a repository, with the files of its tensors and those beside the weights."""
    weights = graph.removesuffix(".xml") + ".bin" if graph.endswith(".xml") else graph
    patterns = [*_BESIDE_THE_WEIGHTS, graph, weights]
    folder = _snapshot(spec, patterns)
    if not (folder / graph).is_file():
        choose(_list_files(spec) or names_in(folder), spec, graph)
        raise HfcompressError(f"model '{spec}': the cache holds only a part of it", OFFLINE)
    outside = external_files(folder, graph, required=False) if graph.endswith(".onnx") else []
    return _snapshot(spec, patterns + outside) if outside else folder


def pickled_directory(spec: str) -> Path:
    """Returns the directory of a model whose weights may be pickled, for code that reads only tensors from pickles."""
    if is_local(spec):
        return model_directory(spec)
    refuse_a_path(spec, "model")
    folder = _snapshot(spec, _BESIDE_THE_WEIGHTS + _SAFETENSORS, _IN_A_FOLDER)
    if any(folder.glob("*.safetensors")):
        return folder
    return _snapshot(spec, [*_BESIDE_THE_WEIGHTS, *PICKLED], _IN_A_FOLDER)


def _snapshot(spec: str, patterns: list[str], ignored: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    repo, revision = _split_revision(spec)
    with hub_calls(f"model '{spec}'"):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))


def _split_revision(spec: str) -> tuple[str, str | None]:
    repo, _, revision = spec.partition("@")
    return repo, revision or None


def _is_offline() -> bool:
    """True if HF_HUB_OFFLINE forbids calls to the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _list_files(spec: str) -> list[str]:
    """Lists the files of a model on the Hub; empty if the Hub may not be called."""
    from huggingface_hub import HfApi

    if _is_offline():
        return []
    repo, revision = _split_revision(spec)
    with hub_calls(f"model '{spec}'"):
        return list(HfApi().list_repo_files(repo, revision=revision))


def require_weights(spec: str) -> None:
    """Refuses a model without weights that can be trained; of a model on the Hub, only the names of files are read.

    Raises:
        HfcompressError: if it has no weights, only pickled ones, or only a graph or quantized weights.
    """
    if is_local(spec) or split_graph(spec)[1]:
        artifact = open_artifact(model_directory(spec))
        trainable, found = artifact.trainable, f"{artifact.runtime} {artifact.dtype}"
    else:
        names = _list_files(spec)
        runtime = choose(names, spec).runtime if names else "torch"
        trainable, found = runtime == "torch" and not model_config(spec).get("quantization_config"), runtime
    if not trainable:
        raise HfcompressError(
            f"{spec} can be measured, but not trained or cut ({found})",
            "name the model that it was made from",
        )


def stored_dtype(spec: str) -> str:
    """Returns the dtype of a model's weights: from the files of a directory, or the config of a model on the Hub."""
    config = model_config(spec)
    if is_local(spec):
        folder = model_directory(spec)
        with suppress(HfcompressError):  # a plan needs no weights
            return torch_dtype(config, read_headers(folder, weight_files(folder)))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def revision_of(folder: Path) -> str | None:
    """Returns the commit of a folder in the Hub's cache; None for any other folder."""
    cached = folder.parent.name == "snapshots" and re.fullmatch(_COMMIT, folder.name)
    return folder.name if cached else None


def model_config(spec: str) -> dict[str, Any]:
    """Reads the config.json of a model, without its weights.

    Raises:
        HfcompressError: if it cannot be read.
    """
    spec, _ = split_graph(spec)
    if spec == BUILTIN or is_directory(spec):
        return read_config(model_directory(spec))
    return read_config(fetch_file(spec, "config.json").parent)


def fetch_file(spec: str, name: str, commit: str | None = None) -> Path:
    """Fetches one file of a model on the Hub.

    Args:
        spec: `id` or `id@revision`.
        name: The file.
        commit: The commit to take it from, in place of the revision.

    Raises:
        HfcompressError: if it is not there, or the Hub cannot be reached.
    """
    refuse_a_path(spec, "model")
    from huggingface_hub import hf_hub_download

    repo, revision = _split_revision(spec)
    with hub_calls(f"model '{spec}'"):
        return Path(hf_hub_download(repo, name, revision=commit or revision))


def refuse_a_path(spec: str, what: str) -> None:
    """Refuses a name that cannot be a Hub id: it is then the path of a directory that does not exist.

    Raises:
        HfcompressError: if `spec` is a path.
    """
    repo, _ = _split_revision(spec)
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or not repo:
        raise HfcompressError(f"no such {what} directory: {spec}", "check the path; a Hub id looks like `user/name`")
    try:
        require_hub_id(repo)
    except ValueError as error:
        raise HfcompressError(f"no such {what} directory, and {error}", "check the path or the id") from None


def is_local(dataset: str) -> bool:
    """True if a data set is on this machine (or in the package)."""
    return dataset == BUILTIN or is_directory(dataset)


def split_file(dataset: str, split: str, splits: Mapping[str, str]) -> Path | None:
    """Finds the file of one split of a local data set; None if there is none.

    Args:
        dataset: A directory, or `builtin:quickstart`.
        split: `train`, `dev` or `test`.
        splits: Renamed splits, such as `{"dev": "heldout"}`.

    Raises:
        HfcompressError: if there is more than one such file, or it is not a regular file.
    """
    folder = _local_folder(dataset)
    names = (splits[split],) if split in splits else SPLIT_NAMES[split]
    possible = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    found = [path for path in possible if os.path.lexists(path)]
    if len(found) > 1:
        raise HfcompressError(
            f"{folder} has more than one {split} file: {' and '.join(path.name for path in found)}",
            "keep one of them and rename the other; `splits:` gives the file name of a split",
        )
    if found and not is_file(found[0]):
        raise HfcompressError(f"{found[0]} is not a file that can be read", "a split is a regular file")
    return found[0] if found else None


def _local_folder(dataset: str) -> Path:
    if dataset == BUILTIN:
        from hfcompress.data.quickstart import write_dataset

        return write_dataset(_builtin_home() / "data")
    return local_path(dataset)


@dataclass(frozen=True)
class Table:
    """The part of a data set that a task reads.

    Attributes:
        dataset: A directory, `builtin:quickstart` or a Hub id.
        config: The configuration of a Hub data set.
        splits: Renamed splits, such as `{"dev": "heldout"}`.
        types: The columns that are read, and the type of each.
        encoding: The encoding of text files in a directory.
    """

    dataset: str
    config: str | None
    splits: Mapping[str, str]
    types: Mapping[str, ColumnType]
    encoding: str = "utf-8"

    def file(self, split: str) -> DataFile | None:
        """Finds the file of a split of a local data set; None if there is none."""
        path = split_file(self.dataset, split, self.splits)
        return None if path is None else data_file(path, self.encoding)

    def read(self, split: str) -> datasets.Dataset | None:
        """Reads one split; None if the data set has no such split.

        Raises:
            HfcompressError: if the data cannot be read, or a value does not fit its column.
        """
        if is_local(self.dataset):
            file = self.file(split)
            return None if file is None else file.read(dict(self.types))
        found = self._on_the_hub(split)
        if found is None:
            return None
        require_columns(list(self.types), found.column_names, self._describe_split(split))
        return convert_columns(found, dict(self.types), self._describe_split(split))

    def stream(self, split: str) -> datasets.IterableDataset | None:
        """Reads one split while it is used, for data that is too large for `read`."""
        if is_local(self.dataset):
            file = self.file(split)
            if file is None:
                return None
            require_columns(list(self.types), file.columns(), file.path.name)
            return file.stream(dict(self.types))
        found = self._on_the_hub(split, streaming=True)
        if found is None:
            return None
        first = next(iter(found), None)
        if first is not None:
            require_columns(list(self.types), list(first), self._describe_split(split))
        convert = partial(_convert_row, types=dict(self.types), where=self._describe_split(split))
        return found.select_columns(list(self.types)).map(
            convert, with_indices=True, features=features_of(dict(self.types))
        )

    def _on_the_hub(self, split: str, streaming: bool = False) -> Any:
        refuse_a_path(self.dataset, "data")
        name = self.find_hub_split(split, streaming)
        return None if name is None else _hub_splits(self.dataset, self.config, streaming)[name]

    def find_hub_split(self, split: str, streaming: bool = False) -> str | None:
        """Finds the name of a split in a Hub data set, such as `validation` for `dev`; None if it has no such split."""
        found = _hub_splits(self.dataset, self.config, streaming)
        names = (self.splits[split],) if split in self.splits else SPLIT_NAMES[split]
        return next((name for name in names if name in found), None)

    def _describe_split(self, split: str) -> str:
        return f"the {split} split of {self.dataset}"


def read_hub_rows(dataset: str, config: str | None, split: str) -> datasets.Dataset | None:
    """Reads one split of a data set on the Hub with all its columns; None if it has no such split.

    Args:
        dataset: The Hub id.
        config: Its configuration.
        split: `train`, `dev` or `test`.
    """
    found: datasets.Dataset | None = Table(dataset, config, {}, {})._on_the_hub(split)
    return found


def _convert_row(row: Mapping[str, Any], number: int, types: Mapping[str, ColumnType], where: str) -> dict[str, Any]:
    return {
        column: read_column(kind, [row[column]], column, lambda _: where, number)[0] for column, kind in types.items()
    }


@lru_cache(maxsize=4)
def _hub_splits(dataset: str, config: str | None, streaming: bool = False) -> Any:
    import datasets

    repo, revision = _split_revision(dataset)
    what = f"data set '{dataset}'"
    with hub_calls(what):
        try:
            return datasets.load_dataset(repo, config, revision=revision, streaming=streaming)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            # The configuration is unknown or missing: the message of the library lists those that exist.
            raise HfcompressError(f"{what}: {first_line(error)}", "set `task.config`, or check the files") from error
        except RuntimeError as error:
            if "Dataset scripts" not in str(error):
                raise
            raise HfcompressError(
                f"{what} is a script; it could run any code, so it is not loaded",
                "name a copy of it that holds csv, jsonl or parquet files, or save it as a directory of such files",
            ) from error


def data_revision(dataset: str, config: str | None, streaming: bool = False) -> str | None:
    """Returns the commit of a data set on the Hub; None if its client does not tell it."""
    if streaming:
        from huggingface_hub import HfApi

        repo, revision = _split_revision(dataset)
        with hub_calls(f"data set '{dataset}'"):
            return HfApi().dataset_info(repo, revision=revision).sha
    files = (file for split in _hub_splits(dataset, config).values() for file in split.cache_files)
    folders = (Path(file["filename"]).parent.name for file in files)
    return next((name for name in folders if re.fullmatch(_COMMIT, name)), None)
