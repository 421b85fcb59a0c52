"""The package prints nothing by itself; the command line shows what it logs."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hfcompress.utils.logging import log, log_to_terminal


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
