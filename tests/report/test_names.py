"""Short names tell models apart."""

from __future__ import annotations

import pytest

from hfcompress.report.names import list_renamed, shorten_names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["source", "01-distill"], ["source", "01-distill"]),
        (["/a/runs/x/01-distill", "/a/runs/x/02-quantize:model.onnx"], ["01-distill", "02-quantize:model.onnx"]),
        (["runs/a/final", "runs/b/final", "org/model"], ["a/final", "b/final", "model"]),
        (["final", "b/final"], ["final", "b/final"]),
        (["a/b", "a/b", "a/c"], ["b", "b", "c"]),
        (["/", "a/"], ["/", "a/"]),
        ([], []),
    ],
)
def test_the_last_parts_that_differ_are_kept(names: list[str], short: list[str]) -> None:
    assert shorten_names(names) == short


def test_a_long_name_loses_its_middle_unless_it_is_mistaken_then() -> None:
    long = "a-model-with-a-very-long-name"
    assert shorten_names([f"{long}-int8", "b"], 15) == ["a-mo…-name-int8", "b"]
    assert shorten_names([f"{long}-int8", f"{long}-fp16"], 15) == ["a-mo…-name-int8", "a-mo…-name-fp16"]
    alike = [f"{long}-x-the-end-of-it", f"{long}-y-the-end-of-it"]
    assert shorten_names(alike, 15) == alike


def test_what_a_short_name_stands_for_is_told_once() -> None:
    rows = [{"stage": name} for name in ("x/a", "x/a", "b")]
    assert list_renamed({"rows": rows}) == [("a", "x/a")]
