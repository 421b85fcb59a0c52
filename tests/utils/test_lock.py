"""One writer at a time: who is refused, and that nobody who died keeps a lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hfcompress.recipe.loader import load
from hfcompress.run import directory as run_directory
from hfcompress.run import runner
from hfcompress.utils import files, lock
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.lock import HeldError, Owner, hold, remove_dead, require_free, shared_directory, shared_file
from tests import factories
from tests.factories import run_cli

HOLD = """
import os, sys
from pathlib import Path
from hfcompress.utils.lock import hold
with hold(Path(sys.argv[1])):
    if "--fork" in sys.argv and os.fork() == 0:
        sys.stdin.readline()  # goes on after its parent was killed
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"{process.pid}\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def test_a_second_process_is_refused_and_told_of_the_first(path: Path) -> None:
    with holder(path) as process:
        for attempt in (require_free, lambda path: hold(path).__enter__()):
            with pytest.raises(HeldError, match=rf"process {process.pid} on .+, since 2\d\d\d-\d\d-\d\d .* UTC"):
                attempt(path)
        assert json.loads(path.read_text())["pid"] == process.pid


def test_the_same_process_is_refused_too(path: Path) -> None:
    with hold(path), pytest.raises(HeldError, match=f"process {os.getpid()}"), hold(path):
        pass


def test_a_lock_leaves_no_file(path: Path) -> None:
    with hold(path):
        assert path.exists()
    assert not path.exists()
    require_free(path)
    assert not path.exists()


def test_a_killed_owner_does_not_block(path: Path) -> None:
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        require_free(path)
        with hold(path) as held:
            assert held.owner.pid == os.getpid()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_outlives_a_killed_owner_does_not_block(path: Path) -> None:
    with holder(path, "--fork") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(path):
            pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff"])
def test_a_torn_record_does_not_block(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with hold(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_lock_whose_directory_was_removed_or_moved_is_not_intact(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    with hold(here / ".lock") as held:
        assert held.is_intact()
        here.rename(tmp_path / "there")
        assert not held.is_intact()
        here.mkdir()
        with hold(here / ".lock") as other:  # somebody begins again in its place
            assert other.is_intact()
            assert not held.is_intact()
            shutil.rmtree(tmp_path / "there")
            assert not held.is_intact()


def test_the_loss_is_noticed_while_the_lock_is_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    lost = threading.Event()
    with hold(path, on_loss=lost.set):
        path.unlink()
        assert lost.wait(20)


# A file system whose locks are local, or that has none


def _elsewhere(path: Path, **changes: str) -> Owner:
    """A record of a process on another machine."""
    owner = replace(lock._myself(), host="other", machine="other/1", pid=1, **changes)
    path.write_text(json.dumps(asdict(owner)))
    return owner


def test_an_owner_on_another_machine_that_beats_is_respected(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operating system's lock is free here, as where a network file system keeps locks on each machine."""
    _elsewhere(path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.01):
            os.utime(path)

    monkeypatch.setattr(lock, "BEAT", 0.05)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(HeldError, match="process 1 on other"), hold(path):
            pass
    finally:
        done.set()
        thread.join()
    assert json.loads(path.read_text())["host"] == "other"


def test_an_owner_on_another_machine_that_stopped_beating_is_dead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _elsewhere(path)
    monkeypatch.setattr(lock, "LAPSE", 0.2)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with hold(path) as held:
        assert held.owner.pid == os.getpid()


def test_how_long_an_owner_is_silent_is_read_off_the_file_servers_clock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was touched an hour ago by the server's clock, which is two hours ahead of ours: nobody waits."""
    _elsewhere(path)
    ahead = path.stat().st_mtime + 7200
    os.utime(path, (ahead - 3600, ahead - 3600))
    monkeypatch.setattr(lock, "_server_time", lambda path: ahead)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("waits"))
    with hold(path):
        pass


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_take_system_lock", lambda descriptor, shared: None)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_number_and_the_start_of_a_process_decide(path: Path) -> None:
    with hold(path) as held:
        with pytest.raises(HeldError, match=f"process {os.getpid()}"), hold(path):
            pass
        another = replace(held.owner, started="12345")  # the number was given to another process
    path.write_text(json.dumps(asdict(another)))
    with hold(path):
        pass
    path.write_text(json.dumps(asdict(replace(another, pid=2**22 + 1))))  # no such process
    with hold(path):
        pass


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_last_of_two_who_came_at_once_has_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = lock._write

    def both(descriptor: int, owner: Owner) -> None:
        write(descriptor, owner)
        _elsewhere(path)

    monkeypatch.setattr(lock, "_write", both)
    with pytest.raises(HeldError, match="on other"), hold(path):
        pass
    assert json.loads(path.read_text())["host"] == "other"


# What several runs write to


def test_a_shared_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "answers"
    with pytest.raises(ZeroDivisionError), shared_directory(target) as scratch:
        (scratch / "half").write_text(f"{1 / 0}")
    assert list((tmp_path / "cache").iterdir()) == []
    with shared_directory(target) as scratch:
        (scratch / "whole").write_text("x")
        assert not target.exists()
    assert factories.snapshot(tmp_path / "cache") == {"answers/whole": b"x"}


def test_the_quicker_of_two_runs_wins(tmp_path: Path) -> None:
    target = tmp_path / "answers"
    with shared_directory(target) as slow:
        (slow / "who").write_text("slow")
        with shared_directory(target) as quick:
            (quick / "who").write_text("quick")
    assert factories.snapshot(tmp_path) == {"answers/who": b"quick"}


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    for name in ("dead.1.partial", "older.partial", "alive.2.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "dead.1.partial.lock").write_text("")
    (tmp_path / "whole").mkdir()
    with holder(tmp_path / "alive.2.partial.lock"):
        with shared_directory(tmp_path / "new"):
            pass
        assert {p.name for p in tmp_path.iterdir()} == {"whole", "new", "alive.2.partial", "alive.2.partial.lock"}
    remove_dead(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "new"}


def test_a_shared_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    with shared_file(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert factories.snapshot(tmp_path) == {"table.json": b"new"}


# Files and directories


@pytest.mark.parametrize("killed_at", ["first", "second"])
def test_a_directory_that_was_being_replaced_is_never_lost(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("new", "01-distill"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    rename = files.rename
    calls: list[Path] = []

    def stop_rename(old: Path, new: Path) -> None:
        calls.append(old)
        if len(calls) == (1 if killed_at == "first" else 2):
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(files, "rename", stop_rename)
        with pytest.raises(KeyboardInterrupt):
            files.replace_directory(tmp_path / "new", tmp_path / "01-distill")
    files.restore(tmp_path / "01-distill")
    assert (tmp_path / "01-distill" / "which").read_text() == "01-distill"
    files.replace_directory(tmp_path / "new", tmp_path / "01-distill")
    assert factories.snapshot(tmp_path) == {"01-distill/which": b"new"}


def test_a_directory_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(FileNotFoundError):
        files.replace_directory(tmp_path / "missing", tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    files.write_text(path, "before")
    with pytest.raises(ZeroDivisionError), files.new_file(path) as scratch:
        scratch.write_text(f"half {1 / 0}")
    assert factories.snapshot(tmp_path) == {"report.json": b"before"}


# A run directory


def test_a_second_run_is_refused_at_once_however_the_directory_is_named(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, link, relative = tmp_path / "run", tmp_path / "link", Path("run")
    directory.mkdir()
    link.symlink_to(directory)
    monkeypatch.setattr(runner, "check", lambda *_, **__: pytest.fail("time was spent"))
    monkeypatch.chdir(tmp_path)
    with holder(directory / run_directory.LOCK) as process:
        before = factories.snapshot(directory)
        for name, *more in ([directory], [directory, "--fresh"], [link, "--set", "seed=7"], [relative]):
            assert run_cli("run", recipe, "--output", name, *more) == 2
            said = capsys.readouterr().err
            assert f"error: another run writes to {name}: process {process.pid} on " in said
            assert "Traceback" not in said
        assert factories.snapshot(directory) == before


def test_a_command_that_writes_into_a_run_is_refused_while_it_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.json").write_text('{"rows": [{}]}')
    monkeypatch.setattr(run_directory, "open_finished", lambda directory: (None, {}))
    with holder(tmp_path / run_directory.LOCK) as process:
        for command in (["report", tmp_path], ["card", tmp_path, "--write"]):
            assert run_cli(*command) == 2
            assert f"another run writes to {tmp_path}: process {process.pid}" in capsys.readouterr().err


def _remove_and_write_on(directory: Path) -> None:
    shutil.rmtree(directory)
    (directory / "01-distill.partial" / "checkpoints").mkdir(parents=True)
    raise FileNotFoundError(directory / "02-prune")


def test_a_run_directory_that_is_removed_is_told_and_not_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    told = "was removed or moved while this run wrote to it"
    with pytest.raises(HfcompressError, match=told), run_directory.exclusive(directory):
        _remove_and_write_on(directory)
    assert not directory.exists()
    directory.mkdir()
    with pytest.raises(HfcompressError, match=told), run_directory.exclusive(directory):
        directory.rename(tmp_path / "moved")


def test_a_run_that_trains_into_a_removed_directory_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    directory = tmp_path / "run"
    directory.mkdir()
    with pytest.raises(HfcompressError, match="was removed or moved"), run_directory.exclusive(directory):
        _remove_and_wait(directory)


def _remove_and_wait(directory: Path) -> None:
    shutil.rmtree(directory)
    threading.Event().wait(60)
    pytest.fail("goes on")


def test_a_directory_with_what_a_killed_run_began_is_taken(recipe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / run_directory.LOCK).write_text("")
    (directory / ".recipe.lock.json.partial").write_text("{")
    run_directory.require_ours(load(recipe), directory, fresh=False)
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(HfcompressError, match="was not made by hfcompress"):
        run_directory.require_ours(load(recipe), directory, fresh=False)


@pytest.mark.parametrize("name", ["final", "01-distill"])
@pytest.mark.parametrize("both", [True, False])
def test_leftovers_of_a_killed_run_are_put_in_order(tmp_path: Path, name: str, both: bool) -> None:
    for folder in (f"{name}.old", *([name] if both else [])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "which").write_text(folder)
    (tmp_path / "plots").mkdir()
    for file in (".report.json.partial", "plots/.tradeoff.png.partial"):
        (tmp_path / file).write_text("half")
    (tmp_path / "thesis.old").mkdir()  # somebody else's
    with run_directory.exclusive(tmp_path):
        assert (tmp_path / name / "which").read_text() == (name if both else f"{name}.old")
    assert {p.name for p in tmp_path.iterdir()} == {name, "plots", "thesis.old"}
    assert list((tmp_path / "plots").iterdir()) == []
