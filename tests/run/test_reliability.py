"""The quick part of `make soak`: runs that are killed, stopped, torn and met by others end as undisturbed ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import __main__ as soak
from tests.soak.harness import Outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="trials are forks")

ROOT = Path(__file__).parents[2]
QUICK = [kind for kind, (_, quick) in soak.DEFAULTS.items() if quick]


def test_runs_survive_what_may_befall_them() -> None:
    """It takes longer than other tests: it is a dozen runs of four stages, and a process that imports everything."""
    command = [sys.executable, "-m", "tests.soak", "--quick", "--seed", "1", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = re.findall(
        r"^\| [^|]+ \| (\d+) \| (\d+) \| 0 \| \d+ \|$", done.stdout.rpartition("| kind |")[2], re.MULTILINE
    )
    assert len(rows) == len(QUICK)
    assert all(tried == right for tried, right in rows)


def test_what_is_not_as_it_should_be_is_counted_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{soak.BEGIN}\nold\n{soak.END}\nafter\n")
    outcome = Outcome("push faults", 1200, ["a traceback"], "to a loopback", 61.7)
    monkeypatch.setattr(soak, "program", lambda *_: outcome)
    assert soak.main(["--only", "push", "--seed", "7", "--write", str(page)]) == 1
    row = "| push faults (to a loopback) | 1,200 | 1,199 | 1 | 62 |"
    assert row in capsys.readouterr().out
    written = page.read_text()
    assert row in written
    assert "seed 7" in written
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")


@pytest.mark.parametrize(
    ("line", "code", "tried", "wrong"),
    [
        ("data files: 2,000 tried, 1,999 as they should be, 1 not (seed 5)", 1, 2000, 1),
        ("push faults: tried 88, as it should 88, not 0", 0, 88, 0),
        ("Traceback", 1, 0, 1),
    ],
)
def test_the_last_line_of_a_program_counts(
    line: str, code: int, tried: int, wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], code, f"more 7\n{line}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(soak.importlib.util, "find_spec", lambda name: name)
    found = soak.program("data", "data files", [])
    assert (found.tried, len(found.wrong)) == (tried, wrong)
