"""Short names of models, by which they are told apart in tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

ELLIPSIS, LONGEST = "…", 32
"""What stands for a part that was left out; characters of a name on the page and in the legend of a plot."""


def list_names(content: Mapping[str, Any], most: int = LONGEST) -> list[str]:
    """Lists the names of a report's models, shortened by `shorten_names`."""
    return shorten_names([str(row["stage"]) for row in content["rows"]], most)


def list_renamed(content: Mapping[str, Any], most: int = LONGEST) -> list[tuple[str, str]]:
    """Lists the short and the full name of each model whose short name leaves something out."""
    pairs = [(name, str(row["stage"])) for name, row in zip(list_names(content, most), content["rows"], strict=True)]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def shorten_names(names: Sequence[str], most: int) -> list[str]:
    """Shortens names as little as needed, and never two different ones to the same.

    What is left out, until all names fit: nothing; the directory that all begin with; all but the last parts of a path
    that tell it from the others; the middle of a name that is still too long.

    Args:
        names: Names, paths or Hub ids.
        most: Characters of a short name.
    """
    tails = find_tails(names)
    for form in (list(names), _leave_out_shared_directory(names), tails):
        if all(len(name) <= most for name in form):
            return form
    cut = [_leave_out_middle(tail, most) for tail in tails]
    return [short if cut.count(short) == tails.count(tail) else tail for short, tail in zip(cut, tails, strict=True)]


def find_tails(names: Sequence[str], least: int = 1) -> list[str]:
    """Finds for each path the last parts that no other path ends with, and at least `least` of them."""
    return [_find_tail(name, [other for other in names if other != name], least) for name in names]


def _find_tail(name: str, others: Sequence[str], least: int) -> str:
    parts = name.split("/")
    for count in range(least, len(parts)):
        tail = parts[-count:]
        if tail[0] and all(other.split("/")[-count:] != tail for other in others):
            return "/".join(tail)
    return name


def _leave_out_shared_directory(names: Sequence[str]) -> list[str]:
    folders = zip(*(name.split("/")[:-1] for name in names), strict=False)
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, folders))
    return ["/".join(name.split("/")[shared:]) for name in names]


def _leave_out_middle(text: str, most: int) -> str:
    """Keeps the end, which has the number, the number type or the graph, longer than the start."""
    if len(text) <= most:
        return text
    start = (most - 1) // 3
    return text[:start] + ELLIPSIS + text[len(text) - (most - 1 - start) :]
