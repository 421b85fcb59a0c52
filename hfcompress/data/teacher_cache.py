"""What a teacher answers, kept on disk: memory-mapped, addressed by row, so any shuffling and any number of processes
share it.

A cache is a directory of `.npy` files and a `cache.json` that names what they were made from and their hashes. It is
written beside its place and renamed there once it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.base.errors import HfcompressError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RECORD = "cache.json"
Content = Literal["logits", "cls", "hidden_states"]


@dataclass(frozen=True)
class Answers:
    """The answers of one teacher to all rows of a data set.

    Attributes:
        offsets: `(rows + 1,)`: row `i` has the tokens `offsets[i] … offsets[i + 1]` of a flat array.
        logits: `(rows, labels)`, or `(tokens, labels)` of a head that answers for each token.
        cls: `(rows, layers + 1, hidden)`: the first token's hidden states; None where they were not asked for.
        hidden_states: `(tokens, layers + 1, hidden)`; None where they were not asked for.
    """

    offsets: NDArray[Any]
    logits: NDArray[Any]
    cls: NDArray[Any] | None = None
    hidden_states: NDArray[Any] | None = None

    def of(self, rows: NDArray[Any], length: int) -> dict[str, NDArray[Any]]:
        """What the teacher answered to some rows, padded with zeros to `length` tokens.

        Returns:
            `logits`, and what else is kept: `cls` `(rows, layers + 1, 1, hidden)` or `hidden_states`
            `(rows, layers + 1, length, hidden)`.
        """
        per_row = len(self.logits) == len(self.offsets) - 1
        found = {"logits": self.logits[rows] if per_row else self._ragged(self.logits, rows, length)}
        if self.hidden_states is not None:
            found["hidden_states"] = self._ragged(self.hidden_states, rows, length).swapaxes(1, 2)
        elif self.cls is not None:
            found["cls"] = self.cls[rows][:, :, None]
        return found

    def _ragged(self, flat: NDArray[Any], rows: NDArray[Any], length: int) -> NDArray[Any]:
        import numpy as np

        start, stop = self.offsets[rows][:, None], self.offsets[rows + 1][:, None]
        places = start + np.arange(length)[None]
        taken = flat[np.minimum(places, len(flat) - 1)]
        inside = (places < stop).reshape(*places.shape, *(1 for _ in flat.shape[1:]))
        return np.where(inside, taken, np.zeros((), flat.dtype))


def open_answers(path: Path, identity: Mapping[str, Any]) -> Answers | None:
    """The answers in a directory, or None where there is none.

    Args:
        path: The directory.
        identity: What they must have been made from.

    Raises:
        HfcompressError: where they were made from something else, or are damaged.
    """
    import numpy as np

    if not path.exists():
        return None
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        files: dict[str, str] = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise _refused(path, f"its {RECORD} is missing or damaged") from None
    if record.get("identity") != dict(identity):
        raise _refused(path, "it was made from another teacher, tokenizer or data")
    for name, expected in files.items():
        if not (path / name).is_file() or _hash(path / name) != expected:
            raise _refused(path, f"{name} is missing or damaged")
    arrays = {Path(name).stem: np.load(path / name, mmap_mode="r", allow_pickle=False) for name in files}
    return Answers(**arrays)


def _refused(path: Path, why: str) -> HfcompressError:
    return HfcompressError(
        f"the teacher cache {path} is not used: {why}", "delete that directory, and the answers are made anew"
    )


class Writer:
    """Fills a cache, batch by batch and by several processes, each with its own rows.

    The first process calls `create` and, once all have written, `finish`; the others open what it created.

    Args:
        scratch: The directory to write in, the same for every process.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._open: dict[str, NDArray[Any]] = {}

    def create(
        self, lengths: Sequence[int], labels: int, *, by_token: bool, content: Content, layers: int = 0, hidden: int = 0
    ) -> None:
        """Makes files of the right size.

        Args:
            lengths: Tokens of each row.
            labels: Width of the logits.
            by_token: Whether there are logits for each token.
            content: What is kept besides the logits.
            layers: Layers of the teacher.
            hidden: Its width.
        """
        import numpy as np

        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
        rows, tokens = len(lengths), int(offsets[-1])
        shapes: dict[str, tuple[int, ...]] = {"logits": (tokens if by_token else rows, labels)}
        if content == "cls":
            shapes["cls"] = (rows, layers + 1, hidden)
        elif content == "hidden_states":
            shapes["hidden_states"] = (tokens, layers + 1, hidden)
        np.save(self.scratch / "offsets.npy", offsets)
        for name, shape in shapes.items():
            np.lib.format.open_memmap(self.scratch / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape).flush()

    def write(self, rows: NDArray[Any], answers: Mapping[str, NDArray[Any]]) -> None:
        """Writes the answers to some rows.

        Args:
            rows: Their numbers.
            answers: By file: `(batch, …)` of a row's answers, `(batch, length, …)` of its tokens'.
        """
        offsets = self._array("offsets")
        for name, values in answers.items():
            target = self._array(name)
            if len(target) == len(offsets) - 1:
                target[rows] = values
                continue
            for row, value in zip(rows.tolist(), values, strict=True):
                start, stop = int(offsets[row]), int(offsets[row + 1])
                target[start:stop] = value[: stop - start]

    def flush(self) -> None:
        """Hands what was written to the file system."""
        for array in self._open.values():
            array.flush()  # type: ignore[attr-defined]
        self._open.clear()

    def finish(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Records what the answers were made from, and gives the directory its name.

        Args:
            path: Its name; where another run was quicker, its answers stay.
            identity: What they were made from.
        """
        files = {file.name: _hash(file) for file in sorted(self.scratch.glob("*.npy"))}
        record = {"identity": dict(identity), "files": files}
        (self.scratch / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            self.scratch.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(self.scratch)

    def _array(self, name: str) -> NDArray[Any]:
        import numpy as np

        if name not in self._open:
            mode = "r" if name == "offsets" else "r+"
            self._open[name] = np.load(self.scratch / f"{name}.npy", mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
        return self._open[name]


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
