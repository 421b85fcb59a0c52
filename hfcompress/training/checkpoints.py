"""The checkpoints that a stage resumes from. A seal proves that a directory is whole: it has a hash of each file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfcompress.utils.files import remove, sync, write_text
from hfcompress.utils.hashing import hash_files

SEAL, STATE = "seal.json", "trainer_state.json"


def seal(directory: Path) -> None:
    """Marks a checkpoint, or another directory, as whole, once all of its files are on the disk."""
    sync(directory)
    write_text(directory / SEAL, json.dumps(_hash_contents(directory), indent=1) + "\n")


def is_sealed(directory: Path) -> bool:
    """True if a directory has all files that it was sealed with, unchanged."""
    try:
        return bool(json.loads((directory / SEAL).read_text(encoding="utf-8")) == _hash_contents(directory))
    except (OSError, ValueError):
        return False


def _hash_contents(directory: Path) -> dict[str, str]:
    return {name: found for name, found in hash_files(directory).items() if name != SEAL}


def last_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint to resume from: it is whole, and so is the best checkpoint that it names."""
    for path in reversed(_list_checkpoints(folder)):
        best = best_checkpoint(path) if is_sealed(path) else None
        if is_sealed(path) and (best is None or is_sealed(best)):
            _name_best(path, best)
            return path
    return None


def best_checkpoint(checkpoint: Path) -> Path | None:
    """Finds the best checkpoint up to a whole one, in the same folder; None if the training keeps no best one."""
    named = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    return checkpoint.with_name(Path(named).name) if named else None


def _name_best(checkpoint: Path, best: Path | None) -> None:
    """Writes where the best checkpoint is now: the Trainer forgets one whose path is no longer right."""
    file = checkpoint / STATE
    state = json.loads(file.read_text(encoding="utf-8"))
    if best is not None and state["best_model_checkpoint"] != str(best):
        write_text(file, json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2) + "\n")
        seal(checkpoint)


def remove_others(folder: Path, *kept: Any) -> None:
    """Removes all checkpoints of a folder except those that are given by their paths."""
    names = {Path(path).name for path in kept if path}
    for path in _list_checkpoints(folder):
        if path.name not in names:
            remove(path)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Lists all checkpoints of a folder, the newest last."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
