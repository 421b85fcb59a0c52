"""Every hash of hfcompress: SHA-256 in hexadecimal digits. Caches, seals and resumed runs are found by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHORT = 16
"""The digits of a short hash, which names a directory or stands in a record that people read."""


def hash_pieces(pieces: Iterable[str | bytes | memoryview]) -> str:
    """Hashes texts (in UTF-8) and bytes as if they were one; where a piece ends makes no difference."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode() if isinstance(piece, str) else piece)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Hashes a JSON value, whatever the order of its keys; a short hash. Other objects count as their text."""
    return hash_pieces([json.dumps(value, sort_keys=True, default=str)])[:SHORT]


def hash_file(path: Path) -> str:
    """Hashes the content of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, str]:
    """Hashes each file below a directory; the keys are the paths in there."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): hash_file(path) for path in files}
