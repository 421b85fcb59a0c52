"""A disk that fills up just before each write of a run: a file system in memory, of a mount namespace of its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak.harness import STAGES, Outcome, Place, World, command, differences, draw, facts, fork, judged, wait
from tests.soak.operations import EVENTS, operation

SIZE = "96m"
WHOLE = 5
"""How many trials there are for each that runs to its end, and not only to the end of the stage."""
QUICK = 0.1
"""A share up to which only the end of a run is looked at."""
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000


def disk(world: World, share: float, seed: int, jobs: int) -> Outcome:
    """The disk is full at each write: it is said, in one line; nothing is lost; with space the run goes on.

    Each stage is begun once for each of its writes, temporary files and caches included.
    """
    probe = world.folder / "mount"
    probe.mkdir(exist_ok=True)
    if wait(fork(lambda: mounted(probe), world.folder / "mount.log"))[0] != 0:
        return Outcome("the disk is full at a write", note="not tried: this user may not mount a file system")
    trials: list[Callable[[], list[str]]] = []
    for done in range(len(STAGES) + 1) if share > QUICK else (len(STAGES),):
        start = _begun(world, done)
        writes = _writes(world, start, done)
        for number in range(1, writes + 1):
            if draw(seed, "disk", done, number).random() < share:
                trials.append(partial(_full, world, start, done, number, seed))
    return judged("the disk is full at a write", trials, jobs)


def mounted(folder: Path) -> None:
    """Mounts an empty file system in memory, which is gone with this process."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if library.unshare(NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USERS) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)


def _begun(world: World, done: int) -> Path:
    """A run whose first stages are done, and its caches."""
    start, whole = world.folder / f"begun-{done}", world.folder / "reference"
    (start / "run").mkdir(parents=True)
    for name in (*STAGES[:done], "recipe.yaml", "recipe.lock.json"):
        source = whole / "run" / name
        if source.is_dir():
            shutil.copytree(source, start / "run" / name)
        elif done:
            shutil.copyfile(source, start / "run" / name)
    if done > 1:
        shutil.copytree(whole / "home", start / "home")
    return start


class _Filler:
    """Counts the writes of a run and of the processes that it starts; takes what is left of the disk before one."""

    def __init__(self, place: Place, disk: Path, at: int, leave: int, last: str) -> None:
        self.roots, self.disk, self.at, self.leave, self.last = (str(place.folder),), disk, at, leave, last
        self.counter = mmap.mmap(-1, 16)  # shared with forks
        self.busy = False

    def __call__(self, event: str, args: Any) -> None:
        if self.busy or event not in EVENTS:
            return
        told = operation(event, args, self.roots)
        if told is None:
            return
        self.busy = True
        try:
            self._count(told)
        finally:
            self.busy = False

    def _count(self, told: str) -> None:
        if self.last and told.startswith("os.rename") and told.endswith(self.last):
            self.counter[8:16] = (1).to_bytes(8, "little")
        if not told.startswith(("open", "os.mkdir")) or int.from_bytes(self.counter[8:16], "little"):
            return
        number = int.from_bytes(self.counter[:8], "little") + 1
        self.counter[:8] = number.to_bytes(8, "little")
        if number == self.at:
            os.write(2, f"\n[the disk is filled before: {told}]\n".encode())
            fill(self.disk, self.leave)

    @property
    def count(self) -> int:
        """Writes up to the end of the stage."""
        return int.from_bytes(self.counter[:8], "little")


def fill(disk: Path, leave: int) -> None:
    """Takes all that is left of a disk but some bytes."""
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    free = os.statvfs(disk)
    size = free.f_bavail * free.f_frsize - leave
    if size > 0:
        os.posix_fallocate(descriptor, 0, size)
    os.close(descriptor)


def _writes(world: World, start: Path, done: int) -> int:
    """How many files and directories a run begins to write until its next stage is done."""
    place = world.place(f"writes-{done}").filled(start)
    filler = _Filler(place, place.folder, 0, 0, f"run/{STAGES[done]}" if done < len(STAGES) else "")
    code, _ = wait(command(world.run(place), place, lambda: sys.addaudithook(filler)))
    assert code == 0, place.said()[-3000:]
    return filler.count


def _full(world: World, start: Path, done: int, number: int, seed: int) -> list[str]:
    disk = world.folder / f"disk-{done}-{number}"
    disk.mkdir()
    mounted(disk)
    place = Place(disk / "place").filled(start)
    leave = draw(seed, "leave", done, number).choice((0, 0, 4096, 16384, 65536))
    before = facts(place)
    filler = _Filler(place, disk, number, leave, "")

    def begin() -> None:
        sys.addaudithook(filler)
        _end_after(done)

    code, _ = wait(command(world.run(place), place, begin))
    said = place.said()
    after = facts(place)
    wrong = [f"{name} was lost" for name in before if "recipe" not in name and after.get(name) != before[name]]
    wrong += [f"{name} is empty" for name, fact in after.items() if fact == "empty" and ".partial" not in name]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or (code == 2 and not (len(errors) == 1 and "the disk is full" in errors[0])):
        wrong.append(f"ended with {code}")
    if "Traceback" in said:
        wrong.append("a traceback")
    if wrong:
        wrong = [f"{', '.join(wrong)}: {said[-3000:]}"]
    (disk / "filler").unlink(missing_ok=True)
    wrong += _goes_on(world, place, done, whole=number % WHOLE == 0)
    return [f"stage {done + 1}, write {number}, {leave} bytes left: {x}" for x in wrong]


def _end_after(done: int) -> None:
    """Ends this process, as a kill does, when the next stage is done: the others do not know how it came about."""
    from hfcompress.run import runner

    run_stage = runner._run_stage

    def run_and_end(name: str, *arguments: Any) -> Any:
        made = run_stage(name, *arguments)
        if name in STAGES[done : done + 1]:
            os._exit(0)
        return made

    runner._run_stage = run_and_end


def _goes_on(world: World, place: Place, done: int, whole: bool) -> list[str]:
    """What is wrong after the same command, with space again; to the end of the run, or of the stage."""
    code, _ = wait(command(world.run(place), place, None if whole else lambda: _end_after(done)))
    if code != 0:
        return [f"with space again it ended with {code}: {place.said()[-1500:]}"]
    expected = world.whole
    if (place.run / ".lock").exists():  # it ended with the stage; it does not where the stage was done already
        (place.run / ".lock").unlink()
        made = tuple(f"run/{name}" for name in ("recipe", *STAGES[: done + 1]))
        expected = {name: fact for name, fact in expected.items() if name.startswith(made) or (done and "home" in name)}
    return differences(place, expected)
