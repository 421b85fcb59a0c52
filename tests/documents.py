"""Reads the commands and snippets of the documentation, and runs them here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.factories import run_cli

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"^python - <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)


def read_blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block, in order."""
    return [
        found for found in _BLOCK.findall(page.read_text(encoding="utf-8")) if not languages or found[0] in languages
    ]


def list_commands(block: str) -> list[str]:
    """The commands of a bash block, without comments; continued lines are one."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def list_spans(page: Path) -> list[str]:
    """The code inside sentences."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def replace_names(text: str, names: Mapping[str, Any]) -> str:
    for name, value in names.items():
        text = text.replace(name, str(value))
    return text


def run_bash(block: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, int, str]]:
    """Runs the commands of a block: `hfcompress …`, with or without `> FILE`, and `python - <<'END'`.

    Returns:
        Each command, its exit code, and what it printed.
    """
    for code in _HEREDOC.findall(block):
        exec(compile(code, "heredoc", "exec"), {"__name__": "__main__"})
    done = []
    for command in list_commands(_HEREDOC.sub("", block)):
        words = shlex.split(command)
        assert words[0] == "hfcompress", f"no test runs {command}"
        arguments, target = (words[1:-2], words[-1]) if words[-2] == ">" else (words[1:], None)
        capsys.readouterr()
        status = run_cli(*arguments)
        printed = capsys.readouterr()
        if target is not None:
            Path(target).write_text(printed.out, encoding="utf-8")
        done.append((command, status, printed.out + printed.err))
    return done
