"""Makes strings from outside safe to print, on a terminal and in Markdown.

Names of columns, labels, files and models, values of a config and messages of a server can contain characters that move
the cursor, hide text or end a code block.
"""

from __future__ import annotations

import os
import re
from typing import Any

# Control characters except tab and newline; surrogates (undecodable bytes of a file name); marks that change the
# direction of writing, with which a line can look like another one; the line separators of Unicode; invisible tags.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Characters that are markup anywhere; at the start of a line; and those that turn an address into a link.
_MARKUP = re.compile(
    r"[\\`*\[\]<>|~&$]|(?<![^\W_])_|_(?![^\W_])"
    r"|^\s*#|^\s*[-+=](?=[\s=-])|^\s*\d+[.)](?=\s|$)"
    r"|(?<=www)\.|:(?=//)",
    re.IGNORECASE,
)


def printable(text: str) -> str:
    r"""Spells out the control characters of a text (`\x1b`) and removes access tokens; newlines and tabs stay."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), without_tokens(text))


def one_line(text: str) -> str:
    r"""Does what `printable` does, and spells out newlines and tabs too: a foreign text must not start a new line."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def without_tokens(text: str) -> str:
    """Replaces the Hub's access tokens in a text by `<token>`."""
    for variable in _TOKEN_VARIABLES:
        if len(token := os.environ.get(variable, "").strip()) >= 8:
            text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


class Markdown(str):
    """A text that is meant as Markdown; a card escapes every other string."""

    __slots__ = ()


def markdown(value: Any) -> Markdown:
    """Escapes a value so that Markdown shows it literally: no tags, links, emphasis, table cells or new lines."""
    if isinstance(value, Markdown):
        return value
    return Markdown(_MARKUP.sub(lambda found: _escape(found[0]), one_line(str(value))))


def _escape(markup: str) -> str:
    return markup[:-1] + "\\" + markup[-1]


def code(text: str, in_table: bool = False) -> Markdown:
    """Formats a text as inline code; it may contain backticks. In a table `|` is escaped, because it ends the cell."""
    text = one_line(text).replace("|", r"\|") if in_table else one_line(text)
    fence = "`" * (_longest_run(text) + 1)
    space = " " if len(fence) > 1 or text[:1] == text[-1:] == " " or not text.strip() else ""
    return Markdown(f"{fence}{space}{text}{space}{fence}")


def code_block(text: str, language: str = "") -> Markdown:
    """Formats a text as a code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{printable(text)}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
