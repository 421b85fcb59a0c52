"""Strings that others wrote, made safe to print: on a terminal, and in Markdown.

Names of columns, labels, files and models, values of a config, messages of a server: each can hold characters that move
a cursor, hide text or end a code block.
"""

from __future__ import annotations

import os
import re
from typing import Any

# Control characters but for tab and newline; surrogates (undecodable bytes of a file name); marks that change the
# direction of writing, which make a line read as another one; the line separators of Unicode; invisible tags.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# What begins something in Markdown wherever it stands; at the start of a line; and what makes an address a link.
_MARKUP = re.compile(
    r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])"
    r"|^\s*#|^\s*[-+=](?=[\s=-])|^\s*\d+[.)](?=\s|$)"
    r"|(?<=www)\.|:(?=//)",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    r"""A text with its control characters spelled out (`\x1b`), and without access tokens; newlines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), without_tokens(text))


def one_line(text: str) -> str:
    r"""`printable`, where a newline or a tab is spelled out too: a foreign text must not begin a line of its own."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def without_tokens(text: str) -> str:
    """A text in which the access tokens of the Hub are left out."""
    for variable in _TOKEN_VARIABLES:
        if len(token := os.environ.get(variable, "").strip()) >= 8:
            text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


class Markdown(str):
    """A text that is Markdown on purpose; every other string is escaped where a card shows it."""

    __slots__ = ()


def markdown(value: Any) -> Markdown:
    """Any value as Markdown that shows it literally: no tag, link, emphasis, table cell or line of its own."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_MARKUP.sub(lambda found: _escaped(found[0]), one_line(str(value))))


def _escaped(markup: str) -> str:
    return markup[:-1] + "\\" + markup[-1]


def code(text: str, in_table: bool = False) -> Markdown:
    """A text as inline code, also one that holds backticks; in a table a `|` would end the cell."""
    text = one_line(text).replace("|", r"\|") if in_table else one_line(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if len(fence) > 1 or text[:1] == text[-1:] == " " or not text.strip() else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}")


def fenced(text: str, language: str = "") -> Markdown:
    """A text as a code block that no run of backticks in it can end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{printable(text)}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
