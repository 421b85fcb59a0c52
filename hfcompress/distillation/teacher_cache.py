"""The files of a teacher cache: a teacher's outputs for all rows, memory-mapped and addressed by row number.

Any order of the rows and any number of processes can use the same cache. It is a directory of `.npy` files and a
`cache.json` with their hashes and the identity of teacher and data. It is written beside its place, and renamed once it
is complete. Reading is memory-mapped; writing is not: on a full disk, a write to mapped memory kills the process, but a
write to a file raises an error with a message.

An Arrow column of `datasets` was tried in place of the files. It takes the same room on the disk within 0.1 MB, but
it is slower: to read and pad a shuffled batch of 32 rows took 0.22 ms instead of 0.003 ms for logits of 3 classes,
0.34 instead of 0.07 ms for logits of 9 tags, and 1.0 to 1.9 instead of 0.67 ms for 5 hidden states of width 312;
writing took 7 to 15 times as long. (Medians of 60 batches in one thread of a busy machine: the ratios count, not the
times.) And an Arrow file grows at its end, while here each process writes its rows to their places in files whose room
on the disk is reserved.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.utils.files import write_text
from hfcompress.utils.hashing import hash_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECORD = "cache.json"
Content = Literal["logits", "cls", "hidden_states"]


@dataclass(frozen=True)
class Answers:
    """The outputs of one teacher for all rows of a data set.

    Attributes:
        offsets: `(rows + 1,)`: row `i` has the tokens `offsets[i] … offsets[i + 1]` of a flat array.
        logits: `(rows, labels)`, or `(tokens, labels)` for a head that answers for each token.
        cls: `(rows, layers + 1, hidden)`: the hidden states of the first token; None if they are not kept.
        hidden_states: `(tokens, layers + 1, hidden)`; None if they are not kept.
    """

    offsets: NDArray[Any]
    logits: NDArray[Any]
    cls: NDArray[Any] | None = None
    hidden_states: NDArray[Any] | None = None

    def of(self, rows: NDArray[Any], length: int) -> dict[str, NDArray[Any]]:
        """Reads the outputs for some rows, padded with zeros to `length` tokens.

        Returns:
            `logits`, and if the cache has them, `cls` `(rows, layers + 1, 1, hidden)` or `hidden_states`
            `(rows, layers + 1, length, hidden)`.
        """
        per_row = len(self.logits) == len(self.offsets) - 1
        found = {"logits": self.logits[rows] if per_row else self._pad(self.logits, rows, length)}
        if self.hidden_states is not None:
            found["hidden_states"] = self._pad(self.hidden_states, rows, length).swapaxes(1, 2)
        elif self.cls is not None:
            found["cls"] = self.cls[rows][:, :, None]
        return found

    def _pad(self, flat: NDArray[Any], rows: NDArray[Any], length: int) -> NDArray[Any]:
        import numpy as np

        padded = np.zeros((len(rows), length, *flat.shape[1:]), flat.dtype)
        for line, start, stop in zip(padded, self.offsets[rows].tolist(), self.offsets[rows + 1].tolist(), strict=True):
            count = min(stop - start, length)
            line[:count] = flat[start : start + count]
        return padded


def find_fault(path: Path, identity: Mapping[str, Any]) -> str | None:
    """Finds the reason why the answers in a directory cannot be used; None if they can.

    Args:
        path: The directory.
        identity: The identity that they must have.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        made_from, files = record["identity"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {RECORD} is missing or damaged"
    if made_from != dict(identity):
        return "it was made from another teacher, tokenizer or data"
    damaged = (name for name, expected in files.items() if not _has_hash(path / name, expected))
    return next((f"{name} is missing or damaged" for name in damaged), None)


def _has_hash(file: Path, expected: str) -> bool:
    return file.is_file() and hash_file(file) == expected


def open_answers(path: Path) -> Answers:
    """Opens the answers in a directory in which `find_fault` finds no fault."""
    import numpy as np

    return Answers(**{file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")})


class Writer:
    """Writes a cache, batch by batch, on several processes at once, each with its own rows.

    The first process calls `create`, and `finish` after all processes have written.

    Args:
        folder: The directory to write in, the same for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, _File] = {}

    def create(
        self, lengths: Sequence[int], labels: int, *, by_token: bool, content: Content, layers: int = 0, hidden: int = 0
    ) -> None:
        """Makes the files with their full size.

        Args:
            lengths: Tokens of each row.
            labels: Width of the logits.
            by_token: True if there are logits for each token.
            content: The outputs to keep besides the logits.
            layers: The number of the teacher's layers.
            hidden: The teacher's hidden width.

        Raises:
            OSError: if the disk has no space for all of them.
        """
        import numpy as np

        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
        rows, tokens = len(lengths), int(offsets[-1])
        shapes: dict[str, tuple[int, ...]] = {"logits": (tokens if by_token else rows, labels)}
        if content == "cls":
            shapes["cls"] = (rows, layers + 1, hidden)
        elif content == "hidden_states":
            shapes["hidden_states"] = (tokens, layers + 1, hidden)
        _create(self.folder / "offsets.npy", offsets.dtype, offsets.shape)
        with _File(self.folder / "offsets.npy") as file:
            file.write(0, offsets)
        for name, shape in shapes.items():
            _create(self.folder / f"{name}.npy", np.dtype(np.float32), shape)

    def write(self, rows: NDArray[Any], answers: Mapping[str, NDArray[Any]]) -> None:
        """Writes the outputs for some rows.

        Args:
            rows: The numbers of the rows.
            answers: The outputs by file: `(batch, …)` with one entry for each row, or `(batch, length, …)` with one for
                each token.
        """
        import numpy as np

        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r", allow_pickle=False)
        for name, values in answers.items():
            if name not in self._open:
                self._open[name] = _File(self.folder / f"{name}.npy")
            file = self._open[name]
            by_row = file.shape[0] == len(offsets) - 1
            for row, value in zip(rows.tolist(), values, strict=True):
                start, stop = (row, row + 1) if by_row else (int(offsets[row]), int(offsets[row + 1]))
                file.write(start, value[None] if by_row else value[: stop - start])

    def close(self) -> None:
        """Closes the files that this process wrote to."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def finish(self, identity: Mapping[str, Any]) -> None:
        """Records the identity of the answers, and the hash of each file.

        Args:
            identity: The teacher, the data and all else that the answers depend on.
        """
        hashes = {file.name: hash_file(file) for file in sorted(self.folder.glob("*.npy"))}
        write_text(self.folder / RECORD, json.dumps({"identity": dict(identity), "files": hashes}, indent=2) + "\n")


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    """Makes a `.npy` file of zeros, and reserves its space on the disk if the system can."""
    import numpy as np

    with path.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.flush()
        size = stream.tell() + math.prod(shape) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)


class _File:
    """A `.npy` file that is written row by row."""

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.path = path
        with path.open("rb") as stream:
            np.lib.format.read_magic(stream)
            self.shape, _, self._dtype = np.lib.format.read_array_header_1_0(stream)
            self._start = stream.tell()
        self._row = math.prod(self.shape[1:]) * self._dtype.itemsize
        self._descriptor = os.open(path, os.O_WRONLY)

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Writes values `(rows, …)` from row number `row` on."""
        import numpy as np

        left = memoryview(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        place = self._start + row * self._row
        while left:
            try:
                count = os.pwrite(self._descriptor, left, place)
            except OSError as error:
                error.filename = str(self.path)
                raise
            left, place = left[count:], place + count

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
