"""Short names of models, by which they are told apart in tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ELLIPSIS = "…"


def list_names(content: Mapping[str, Any], most: int | None = None) -> list[str]:
    """Lists the short names of a report's models; see `shorten_names`."""
    return shorten_names([str(row["stage"]) for row in content["rows"]], most)


def list_renamed(content: Mapping[str, Any], most: int | None = None) -> list[tuple[str, str]]:
    """Lists the short and the full name of each model whose short name leaves something out."""
    names = list_names(content, most)
    pairs = [(name, str(row["stage"])) for name, row in zip(names, content["rows"], strict=True)]
    return [pair for pair in dict.fromkeys(pairs) if pair[0] != pair[1]]


def shorten_names(names: Sequence[str], most: int | None = None) -> list[str]:
    """Shortens names to the last parts of their paths that tell them apart.

    Args:
        names: Names, paths or Hub ids.
        most: Characters of a short name: of a longer one the middle is left out, if the names still differ then.
    """
    tails = [_find_tail(name, [other for other in names if other != name]) for name in names]
    if most is None:
        return tails
    cut = [_leave_out_middle(tail, most) for tail in tails]
    return [short if cut.count(short) == tails.count(tail) else tail for short, tail in zip(cut, tails, strict=True)]


def _find_tail(name: str, others: Sequence[str]) -> str:
    parts = name.split("/")
    for count in range(1, len(parts)):
        tail = parts[-count:]
        if tail[0] and all(other.split("/")[-count:] != tail for other in others):
            return "/".join(tail)
    return name


def _leave_out_middle(text: str, most: int) -> str:
    """Keeps the end, which has the number, the number type or the graph, longer than the start."""
    if len(text) <= most:
        return text
    start = (most - 1) // 3
    return text[:start] + ELLIPSIS + text[len(text) - (most - 1 - start) :]
