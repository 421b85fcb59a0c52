"""Writes files and directories completely or not at all: under another name first, then synced and renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PARTIAL, OLD = ".partial", ".old"
"""Endings of names: of what is being written, and of what is being replaced."""
LEAST = 2**18
"""A disk with fewer free bytes counts as full."""


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, completely or not at all."""
    with new_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object from a file; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. When the block ends the file gets the name `path`; if it fails the file is removed."""
    scratch = path.with_name(f".{path.name}{PARTIAL}")
    try:
        yield scratch
        _sync_file(scratch)
        rename(scratch, path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory to fill. When the block ends it gets the name `target`; if it fails it is removed.

    Use it where only this process writes; elsewhere use `lock.shared_directory`.
    """
    scratch = target.with_name(target.name + PARTIAL)
    remove(scratch)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        replace_directory(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yields a temporary directory in `TMPDIR`, for libraries that can only write to a file.

    Raises:
        OSError: for a full disk, in place of the library's own error about a file that was cut off.
    """
    with TemporaryDirectory(prefix="hfcompress-") as folder:
        try:
            yield Path(folder)
        except Exception as error:
            require_space(Path(folder), error)
            raise


def require_space(folder: Path, cause: BaseException | None = None) -> None:
    """Requires some free space on the disk of a folder.

    Raises:
        OSError: if the disk is full.
    """
    if shutil.disk_usage(folder).free < LEAST:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from cause


def replace_directory(new: Path, target: Path) -> None:
    """Gives a directory the name `target`, and removes the directory that had it.

    It takes two renames, because a directory cannot be renamed onto another one. A process that is killed between them
    leaves `target` under the name `target.old`; `restore` gives it its name back.
    """
    sync(new)
    restore(target)
    old = target.with_name(target.name + OLD)
    if target.exists():
        rename(target, old)
    try:
        rename(new, target)
    except OSError:
        restore(target)
        raise
    remove(old)


def restore(target: Path) -> None:
    """Finishes a killed `replace_directory`: the old directory gets its name back, or is removed if `target` exists."""
    old = target.with_name(target.name + OLD)
    if not old.exists():
        return
    if target.exists():
        remove(old)
    else:
        rename(old, target)


def rename(old: Path, new: Path) -> None:
    """Renames a file or directory in one step, so `new` is never incomplete; replaces a file of that name.

    Call `sync` on `old` before: otherwise a power cut may leave an empty file under the new name.

    Raises:
        OSError: also if `new` is a directory that is not empty.
    """
    old.replace(new)
    _sync_directory(new.parent)


def remove_half_files(folder: Path) -> None:
    """Removes the unfinished files of a killed process from a folder that only this process writes to."""
    for scratch in folder.glob(f".*{PARTIAL}"):
        if scratch.is_file():
            scratch.unlink()


def remove(path: Path) -> None:
    """Removes a file, or a directory with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file, or each file below a directory, to the disk, so that a power cut does not leave an empty file.

    Raises:
        OSError: also for a full disk that the file system has not noticed before.
    """
    if not path.is_dir():
        _sync_file(path)
    for place, _, names in os.walk(path):
        for name in names:
            _sync_file(Path(place, name))
        _sync_directory(Path(place))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # the file may be read-only
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # some file systems, and Windows, have no such thing
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
