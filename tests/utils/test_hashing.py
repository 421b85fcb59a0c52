"""Hashes are the names of caches and the keys of resumed runs: they may never change."""

from __future__ import annotations

from pathlib import Path

from hfcompress.utils.hashing import hash_file, hash_files, hash_json, hash_pieces

AB = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"
"""`printf ab | sha256sum`"""


def test_a_hash_of_today_is_the_hash_of_before() -> None:
    assert hash_json({"b": [1, 0.5, None], "a": Path("ä")}) == hash_json({"a": Path("ä"), "b": [1, 0.5, None]})
    assert hash_json({"b": [1, 0.5, None], "a": Path("ä")}) == "3b713cd84a84cc64"
    assert hash_pieces(["a", b"b"]) == hash_pieces([memoryview(b"ab")]) == AB


def test_files_are_hashed_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"ab")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "two").write_bytes(b"ab")
    assert hash_files(tmp_path) == {"below/two": AB, "one": hash_file(tmp_path / "one")} == {"below/two": AB, "one": AB}
