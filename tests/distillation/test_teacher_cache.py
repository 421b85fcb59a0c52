"""A teacher's answers on disk: whole or not there, addressed by row, the same bits that were written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.distillation.teacher_cache import RECORD, Answers, Writer, find_fault, open_answers
from hfcompress.utils.errors import disk_problem

IDENTITY = {"teacher": "abc", "data": "def", "max_length": 16}
LENGTHS = [3, 5, 1, 4]


def filled(folder: Path, content: Any = "logits", by_token: bool = False, writers: int = 1) -> dict[str, Any]:
    """A cache of random answers; returns what was written, rows padded to five tokens."""
    draw = np.random.default_rng(0)
    (folder / "c").mkdir()
    first = Writer(folder / "c")
    first.create(LENGTHS, 2, by_token=by_token, content=content, layers=2, hidden=6)
    answers = {"logits": draw.normal(size=(4, 5, 2) if by_token else (4, 2)).astype(np.float32)}
    if content == "cls":
        answers["cls"] = draw.normal(size=(4, 3, 6)).astype(np.float32)
    if content == "hidden_states":
        answers["hidden_states"] = draw.normal(size=(4, 5, 3, 6)).astype(np.float32)
    order = np.array([2, 0, 3, 1])
    for number in range(writers):
        writer, rows = Writer(folder / "c"), order[number::writers]
        writer.write(rows, {name: values[rows] for name, values in answers.items()})
        writer.close()
    first.finish(IDENTITY)
    return answers


def opened(folder: Path) -> Answers:
    assert find_fault(folder / "c", IDENTITY) is None
    return open_answers(folder / "c")


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


def test_a_cache_that_was_not_finished_is_none(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.create(LENGTHS, 2, by_token=False, content="logits")
    writer.write(np.array([0]), {"logits": np.ones((1, 2), np.float32)})
    assert find_fault(tmp_path, IDENTITY) == f"its {RECORD} is missing or damaged"


def test_answers_to_something_else_are_not_used(tmp_path: Path) -> None:
    filled(tmp_path)
    for key in IDENTITY:
        assert find_fault(tmp_path / "c", {**IDENTITY, key: "other"}) == (
            "it was made from another teacher, tokenizer or data"
        )


@pytest.mark.parametrize("name", ["logits.npy", "offsets.npy", RECORD])
@pytest.mark.parametrize("how", ["changed", "cut short", "empty", "removed"])
def test_a_damaged_cache_is_not_used(tmp_path: Path, name: str, how: str) -> None:
    filled(tmp_path)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "removed":
        path.unlink()
    else:
        part = len(content) if how == "changed" and name != RECORD else 0 if how == "empty" else len(content) // 2
        path.write_bytes(content[:part])
    why = find_fault(tmp_path / "c", IDENTITY)
    assert why is not None
    assert f"{name} is missing or damaged" in why


def test_room_for_all_answers_is_taken_before_the_teacher_is_asked(tmp_path: Path) -> None:
    Writer(tmp_path).create([64] * 1000, 2, by_token=True, content="hidden_states", layers=2, hidden=16)
    for file in tmp_path.glob("*.npy"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size


def test_a_file_that_cannot_grow_is_an_error_that_can_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    writer.create(LENGTHS, 2, by_token=False, content="logits")
    room = [12]

    def full(descriptor: int, content: Any, place: int) -> int:
        count, room[0] = min(len(content), room[0]), 0
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, content[:count], place)

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as error:
        writer.write(np.array([0, 1]), {"logits": np.ones((2, 2), np.float32)})
    assert disk_problem(error.value) == f"the disk is full: {tmp_path / 'logits.npy'}"
