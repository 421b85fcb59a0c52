"""Errors that a user can fix. Each says what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hfcompress.utils.escape import one_line

Key = tuple[str | int, ...]

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "a name is too long for the file system",
    errno.ELOOP: "a link leads back to itself",
    errno.ENOTDIR: "a file stands where a directory has to be",
}

_FULL = (_DISK_ERRORS[errno.ENOSPC], _DISK_ERRORS[errno.EDQUOT])
_WRITE_FAILED = r"inline_container.*(unexpected pos|file write failed)|Writer failed|\d+ requested and \d+ written"
"""Messages of torch.save and numpy when a disk fills up while they write."""


@dataclass(frozen=True)
class Problem:
    """A mistake of the user.

    Attributes:
        message: What is wrong.
        fix: How to fix it.
        key: The path inside the recipe, such as `("stages", 0, "train", "epochs")`.
        where: File and line, added by the caller that knows them.
    """

    message: str
    fix: str = ""
    key: Key = ()
    where: str = ""

    def __str__(self) -> str:
        # Each part may quote a file, and must not start a new line.
        place = " ".join(one_line(part) for part in (self.where, spell_key(self.key)) if part)
        fix = f"\n    {one_line(self.fix)}" if self.fix else ""
        return (f"{place}: " if place else "") + one_line(self.message) + fix


C = TypeVar("C")


@dataclass(frozen=True)
class Rule(Generic[C]):
    """A row of a table of refusals.

    Attributes:
        when: True if the rule refuses the case.
        message: What is wrong; each table says what its `{…}` stand for.
        fix: How to fix it.
        key: The key path inside the stage.
    """

    when: Callable[[C], Any]
    message: str
    fix: str
    key: Key = ()


class HfcompressError(Exception):
    """One or more mistakes of the user; the command line prints them without a traceback and exits with 2."""

    def __init__(self, problem: str | Problem | Iterable[Problem], fix: str = "") -> None:
        if isinstance(problem, str):
            problem = Problem(problem, fix)
        self.problems = [problem] if isinstance(problem, Problem) else list(problem)
        super().__init__("\n".join(str(p) for p in self.problems))


def spell_key(key: Key) -> str:
    """Spells `("stages", 0, "kind")` as `stages.0.kind`, which `--set` takes."""
    return ".".join(str(part) for part in key)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggests the nearest known word, or all words if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from: {', '.join(known)}" if known else ""


def disk_problem(error: BaseException) -> str | None:
    """Describes the disk problem behind an error, such as a full disk; None for any other error.

    Libraries wrap the system's error, or describe it in their own words. A full disk is also found in the errors that
    `error` was raised from.
    """
    found, seen, link = _disk_problem(error), {id(error)}, error.__cause__ or error.__context__
    while found is None and link is not None and id(link) not in seen:
        seen.add(id(link))
        told = _disk_problem(link)
        found = told if told is not None and told.startswith(_FULL) else None
        link = link.__cause__ or link.__context__
    return found


def _disk_problem(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return _DISK_ERRORS[error.errno] + (f": {error.filename}" if error.filename else "")
    text = str(error)
    if number := re.search(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]", text):
        return _DISK_ERRORS.get(int(number[1] or number[2]))
    return _DISK_ERRORS[errno.ENOSPC] if is_full_disk_message(text) else None


def is_full_disk_message(text: str) -> bool:
    """True if a library's message says that the disk is full."""
    said = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    return any(words in text for words in said) or re.search(_WRITE_FAILED, text) is not None


def require_directory(path: Path, what: str) -> Path:
    """Returns `path` if it is a directory.

    Raises:
        HfcompressError: if it is not.
    """
    if not path.is_dir():
        raise HfcompressError(f"{what} not found: {path}", "give the path of an existing directory")
    return path
