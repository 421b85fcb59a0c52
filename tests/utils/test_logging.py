"""The package prints nothing by itself; the command line shows what it logs."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from hfcompress.utils import logging as console
from hfcompress.utils.logging import log, log_to_terminal, print_text


@pytest.mark.parametrize(("setup", "shown"), [("", "warned"), ("logging.basicConfig(level='INFO')", "told warned")])
def test_a_program_hears_warnings_alone_unless_it_asks(setup: str, shown: str) -> None:
    lines = ["import logging", "from hfcompress.utils.logging import log", setup, "log.info('told')"]
    script = "\n".join([*lines, "log.warning('warned')"])
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert ended.stdout == ""
    assert [line.split(":")[-1] for line in ended.stderr.splitlines()] == shown.split()


def test_the_command_line_shows_progress_and_marks_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_terminal():
        log.info("01-prune: done")
        log.warning("[red]rare[/red] label")

    assert capsys.readouterr().err == "01-prune: done\nwarning: [red]rare[/red] label\n"


def test_only_the_first_process_of_a_distributed_run_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with log_to_terminal():
        log.warning("told once")

    assert capsys.readouterr().err == ""


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_terminal():
        log.log(logging.INFO, "x " * 200)

    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("terminal", "width"), [(True, 100), (False, 239)])
def test_a_paragraph_is_broken_between_words_on_a_terminal_alone(
    terminal: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(console, "out", lambda: console._console(file=stream, force_terminal=terminal, width=300))
    print_text(f"{'word ' * 20}/a/path/{'x' * 120} some-thing")
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) == max(width, 128)
    assert any(line.startswith("/a/path/") for line in lines) == terminal
    assert lines[-1].endswith("some-thing")
