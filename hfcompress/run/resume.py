"""Finds the finished directory of a stage by a key, or keeps its interrupted attempt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import Stage, StageContext
from hfcompress.measure.environment import versions
from hfcompress.models.artifact import Artifact, open_artifact, weights_hash
from hfcompress.recipe.schema import spell_out_stage
from hfcompress.utils.distributed import process_state
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import (
    read_json,
    remove,
    remove_half_files,
    write_text,
)
from hfcompress.utils.hashing import hash_file, hash_json
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from hfcompress.data.task import Task


KEY = "key"
"""The file with the key of the attempt, in a stage's working directory."""


def make_key(stage: Stage, parent: Artifact, context: StageContext) -> str:
    """Hashes everything that a stage's result depends on."""
    return hash_json(
        {
            "stage": spell_out_stage(stage),
            "parent": weights_hash(parent.path),
            "named": [weights_hash(context.artifact(spec, parent).path) for spec in stage.specs().values()],
            "task": describe_task(context.task),
            "data": context.fingerprint(),
            "seed": context.seed,
            "versions": versions(),
            "device": process_state().device.type,
        }
    )


def describe_task(task: Task) -> dict[str, Any]:
    """Describes what a task does with its rows; an option of later versions is left out at its default."""
    return task.model_dump(exclude={"dataset", *(["dev_rows"] if task.dev_rows is None else [])})


def find_finished(path: Path, key: str, stage: Stage) -> Artifact | None:
    """Opens the result of a stage; None if it is not done.

    Raises:
        HfcompressError: if its files have changed since.
    """
    record = read_json(path / "stage.json")
    if record is None and path.is_dir():
        log.info(f"{path.name} is made again: its stage.json is missing or damaged")
    if record is None or record.get("key") != key:
        return None
    for name, expected in record.get("files", {}).items():
        file = path / name
        if not file.is_file() or hash_file(file) != expected:
            raise HfcompressError(
                f"{file} is {'damaged or was changed' if file.is_file() else 'missing'}",
                f"remove {path}, and the same command makes it again; or run with --output elsewhere",
            )
    return open_artifact(path, path.name, stage.kind)


def begin_attempt(folder: Path, key: str) -> None:
    """Prepares a stage's working directory: keeps an interrupted attempt with the same key, removes any other."""
    mark = folder / KEY
    if folder.is_dir() and read_mark(mark) != key:
        remove(folder)
    remove(folder / "model")
    folder.mkdir(exist_ok=True)
    remove_half_files(folder)
    write_text(mark, key)


def read_mark(path: Path) -> str | None:
    """Reads the key of an attempt; None if the file is missing or damaged."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
