"""A teacher's answers on disk: whole or not there, addressed by row, the same bits that were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.base.errors import HfcompressError
from hfcompress.data.teacher_cache import RECORD, Answers, Writer, open_answers

IDENTITY = {"teacher": "abc", "data": "def", "max_length": 16}
LENGTHS = [3, 5, 1, 4]


def filled(folder: Path, content: Any = "logits", by_token: bool = False, writers: int = 1) -> dict[str, Any]:
    """A cache of random answers; returns what was written, rows padded to five tokens."""
    draw = np.random.default_rng(0)
    first = Writer(folder / "c.partial")
    first.create(LENGTHS, 2, by_token=by_token, content=content, layers=2, hidden=6)
    answers = {"logits": draw.normal(size=(4, 5, 2) if by_token else (4, 2)).astype(np.float32)}
    if content == "cls":
        answers["cls"] = draw.normal(size=(4, 3, 6)).astype(np.float32)
    if content == "hidden_states":
        answers["hidden_states"] = draw.normal(size=(4, 5, 3, 6)).astype(np.float32)
    order = np.array([2, 0, 3, 1])
    for number in range(writers):
        writer, rows = Writer(folder / "c.partial"), order[number::writers]
        writer.write(rows, {name: values[rows] for name, values in answers.items()})
        writer.flush()
    first.finish(folder / "c", IDENTITY)
    return answers


def opened(folder: Path) -> Answers:
    found = open_answers(folder / "c", IDENTITY)
    assert found is not None
    return found


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("content", ["logits", "cls", "hidden_states"])
@pytest.mark.parametrize("by_token", [False, True])
def test_what_was_written_is_read_bit_for_bit_in_any_order(
    tmp_path: Path, content: str, by_token: bool, writers: int
) -> None:
    written, rows, length = filled(tmp_path, content, by_token, writers), np.array([3, 1]), 5
    found = opened(tmp_path).of(rows, length)
    real = np.arange(length)[None] < np.array(LENGTHS)[rows][:, None]
    expected = written["logits"][rows] * (real[:, :, None] if by_token else 1)
    assert np.array_equal(found["logits"], expected)
    if content == "cls":
        assert np.array_equal(found["cls"], written["cls"][rows][:, :, None])
    if content == "hidden_states":
        states = written["hidden_states"][rows] * real[:, :, None, None]
        assert np.array_equal(found["hidden_states"], states.transpose(0, 2, 1, 3))


def test_rows_are_padded_to_the_batch(tmp_path: Path) -> None:
    written = filled(tmp_path, by_token=True)
    found = opened(tmp_path).of(np.array([2, 0]), 8)["logits"]
    assert found.shape == (2, 8, 2)
    assert np.array_equal(found[1, :3], written["logits"][0, :3])
    assert not found[0, 1:].any()
    assert not found[1, 3:].any()


def test_the_arrays_are_mapped_not_loaded(tmp_path: Path) -> None:
    filled(tmp_path)
    assert isinstance(opened(tmp_path).logits, np.memmap)


def test_no_directory_is_no_cache(tmp_path: Path) -> None:
    assert open_answers(tmp_path / "c", IDENTITY) is None


def test_a_run_that_dies_while_writing_leaves_no_cache(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "c.partial")
    writer.create(LENGTHS, 2, by_token=False, content="logits")
    writer.write(np.array([0]), {"logits": np.ones((1, 2), np.float32)})
    assert open_answers(tmp_path / "c", IDENTITY) is None
    (tmp_path / "c.partial").rename(tmp_path / "c")
    with pytest.raises(HfcompressError, match=f"{RECORD} is missing or damaged"):
        open_answers(tmp_path / "c", IDENTITY)


def test_answers_to_something_else_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    for key in IDENTITY:
        with pytest.raises(HfcompressError, match="another teacher, tokenizer or data") as error:
            open_answers(tmp_path / "c", {**IDENTITY, key: "other"})
        assert "delete that directory" in str(error.value)


@pytest.mark.parametrize("name", ["logits.npy", "offsets.npy", RECORD])
@pytest.mark.parametrize("how", ["changed", "cut short", "removed"])
def test_a_damaged_cache_is_refused(tmp_path: Path, name: str, how: str) -> None:
    filled(tmp_path)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(content if how == "changed" and name != RECORD else content[: len(content) // 2])
    with pytest.raises(HfcompressError, match=f"{name} is missing or damaged"):
        open_answers(tmp_path / "c", IDENTITY)


def test_the_quicker_of_two_runs_wins(tmp_path: Path) -> None:
    written = filled(tmp_path)
    other = Writer(tmp_path / "d.partial")
    other.create(LENGTHS, 2, by_token=False, content="logits")
    other.finish(tmp_path / "c", IDENTITY)
    assert np.array_equal(opened(tmp_path).logits, written["logits"])
    assert not (tmp_path / "d.partial").exists()
