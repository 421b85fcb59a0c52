"""Short names tell models apart."""

from __future__ import annotations

import pytest

from hfcompress.report.names import find_tails, list_renamed, shorten_names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["source", "01-distill"], ["source", "01-distill"]),
        (["org/model", "other/model"], ["org/model", "other/model"]),
        (["/a/runs/x/01-distill", "/a/runs/x/02-quantize:a.onnx"], ["01-distill", "02-quantize:a.onnx"]),
        (["/big/data/runs/a/final", "/big/data/runs/b/final", "/big/data/c"], ["runs/a/final", "runs/b/final", "c"]),
        (["one-organization/a", "another-organization/b"], ["a", "b"]),
        (["final", "directory/of/runs/final"], ["final", "runs/final"]),
        (["much-longer-directory/b", "much-longer-directory/b", "much-longer-directory/c"], ["b", "b", "c"]),
        (["/", "a/"], ["/", "a/"]),
        ([], []),
    ],
)
def test_a_name_loses_as_little_as_is_needed(names: list[str], short: list[str]) -> None:
    assert shorten_names(names, 18) == short


def test_the_last_parts_that_no_other_path_ends_with_are_found() -> None:
    paths = ["/runs/a/final", "/old/runs/a/final", "/runs/b/final", "org/model"]
    assert find_tails(paths) == ["/runs/a/final", "old/runs/a/final", "b/final", "model"]
    assert find_tails(paths[2:], least=2) == ["b/final", "org/model"]


def test_a_long_name_loses_its_middle_unless_it_is_mistaken_then() -> None:
    long = "a-model-with-a-very-long-name"
    assert shorten_names([f"{long}-int8", "b"], 15) == ["a-mo…-name-int8", "b"]
    assert shorten_names([f"{long}-int8", f"{long}-fp16"], 15) == ["a-mo…-name-int8", "a-mo…-name-fp16"]
    alike = [f"{long}-x-the-end-of-it", f"{long}-y-the-end-of-it"]
    assert shorten_names(alike, 15) == alike


def test_what_a_short_name_stands_for_is_told_once() -> None:
    rows = [{"stage": name} for name in ("x/a", "x/a", "b")]
    assert list_renamed({"rows": rows}, 2) == [("a", "x/a")]
    assert list_renamed({"rows": rows}) == []
