"""Finds, seals and removes checkpoints. A seal has a hash of each file, and so proves that a directory is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfcompress.utils.files import remove, sync, write_text
from hfcompress.utils.hashing import hash_files

SEAL, STATE = "seal.json", "trainer_state.json"


def seal(directory: Path) -> None:
    """Marks a checkpoint, or another directory, as complete, once all of its files are on the disk."""
    sync(directory)
    write_text(directory / SEAL, json.dumps(_hash_contents(directory), indent=1) + "\n")


def is_sealed(directory: Path) -> bool:
    """True if a directory has the same files as when it was sealed, unchanged."""
    try:
        return bool(json.loads((directory / SEAL).read_text(encoding="utf-8")) == _hash_contents(directory))
    except (OSError, ValueError):
        return False


def _hash_contents(directory: Path) -> dict[str, str]:
    return {name: found for name, found in hash_files(directory).items() if name != SEAL}


def find_last_checkpoint(folder: Path) -> Path | None:
    """Finds the newest complete checkpoint whose best checkpoint is complete too."""
    for path in reversed(_list_checkpoints(folder)):
        best = find_best_checkpoint(path) if is_sealed(path) else None
        if is_sealed(path) and (best is None or is_sealed(best)):
            _name_best(path, best)
            return path
    return None


def find_best_checkpoint(checkpoint: Path) -> Path | None:
    """Finds the best checkpoint that a complete one names, in the same folder; None if it names none."""
    named = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    return checkpoint.with_name(Path(named).name) if named else None


def _name_best(checkpoint: Path, best: Path | None) -> None:
    """Writes the present path of the best checkpoint: the Trainer forgets a best checkpoint that was moved."""
    file = checkpoint / STATE
    state = json.loads(file.read_text(encoding="utf-8"))
    if best is not None and state["best_model_checkpoint"] != str(best):
        write_text(file, json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2) + "\n")
        seal(checkpoint)


def remove_others(folder: Path, *kept: Any) -> None:
    """Removes all checkpoints of a folder except those with the given paths."""
    names = {Path(path).name for path in kept if path}
    for path in _list_checkpoints(folder):
        if path.name not in names:
            remove(path)


def _list_checkpoints(folder: Path) -> list[Path]:
    """Lists the checkpoints of a folder, the newest last."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
