"""A kill at every file operation of a run.

A killed process leaves its files as they are at that moment. So one run is watched, its folders are copied at each of
its file operations, and the same command is started on every copy that is unlike the others.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak.harness import STAGES, Outcome, Place, World, command, ends_alike, facts, judged, wait

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"})


def operation(event: str, args: Sequence[Any], roots: Sequence[str]) -> str | None:
    """What a file operation that writes below one of some folders does, in words; None for any other event."""
    if event not in EVENTS or not args:
        return None
    if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
        return None
    named = args[: 1 if event in ("open", "os.mkdir", "os.remove", "os.rmdir", "os.truncate") else 2]
    paths = [Path(os.fsdecode(x)) for x in named if isinstance(x, str | bytes | os.PathLike)]
    if event in ("os.remove", "os.rmdir") and paths and not paths[0].is_absolute():
        return f"{event} {paths[0]}"  # shutil.rmtree names a file by its directory's descriptor
    told = [str(path.absolute()) for path in paths]
    return f"{event} {' '.join(told)}" if any(path.startswith(tuple(roots)) for path in told) else None


@dataclass(frozen=True)
class State:
    """The folders of a run at one of its file operations."""

    number: int
    operation: str
    copy: Path


class _Recorder:
    """Copies a place before each of its file operations; files that did not change are linked, not copied."""

    def __init__(self, place: Place, store: Path) -> None:
        self.place, self.store = place, store
        self.busy, self.count = False, 0
        self.known: dict[tuple[int, int, int], str] = {}
        self.states: set[tuple[tuple[str, str], ...]] = set()

    def __call__(self, event: str, args: Any) -> None:
        if self.busy or event not in EVENTS or os.getpid() != self.pid:
            return
        told = operation(event, args, (f"{self.place.run}", f"{self.place.home}"))
        if told is None:
            return
        self.busy = True
        try:
            self._copy(told)
        finally:
            self.busy = False

    def start(self) -> None:
        self.pid = os.getpid()
        sys.addaudithook(self)

    def _copy(self, told: str) -> None:
        self.count += 1
        listing, folders = [], []
        for top in ("run", "home"):
            for place, names, files in os.walk(self.place.folder / top):
                relative = os.path.relpath(place, self.place.folder)
                folders.append(relative)
                listing += [(f"{relative}/{name}/", "") for name in names]
                listing += [(f"{relative}/{name}", self._kept(Path(place, name))) for name in files]
        state = tuple(sorted(listing))
        with open(self.store / "operations", "a", encoding="utf-8") as stream:  # noqa: PTH123
            new = state not in self.states
            stream.write(f"{self.count}\t{int(new)}\t{told}\n")
        if not new:
            return
        self.states.add(state)
        target = self.store / str(self.count)
        for folder in folders:
            (target / folder).mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True)
        for name, kept in state:
            if kept:
                os.link(kept, target / name)

    def _kept(self, path: Path) -> str:
        """A copy of a file as it is now; the same one as long as it does not change."""
        found = path.stat()
        key = (found.st_ino, found.st_mtime_ns, found.st_size)
        if key not in self.known:
            kept = str(self.store / f"file-{len(self.known)}")
            shutil.copyfile(path, kept)
            self.known[key] = kept
        return self.known[key]


def recorded(place: Place, arguments: Sequence[object], store: Path) -> tuple[list[str], list[State]]:
    """Runs a command; all of its file operations, and a state for each that leaves the folders unlike before."""
    store.mkdir(parents=True)
    recorder = _Recorder(place, store)
    code, _ = wait(command(arguments, place, recorder.start), 3 * 240)
    assert code == 0, place.said()[-3000:]
    lines = [line.split("\t") for line in (store / "operations").read_text(encoding="utf-8").splitlines()]
    states = [State(int(number), told, store / number) for number, new, told in lines if new == "1"]
    return [told for _, _, told in lines], states


def operations(world: World, share: float, jobs: int) -> Outcome:
    """A kill at each file operation of a run; with a share below 1, at some, and at every other one of its end."""
    place = world.place("watched").filled(None)
    told, states = recorded(place, world.run(place), world.folder / "states")
    wrong = [f"the watched run differs: {x}" for x in _unlike(place, world)]
    last = next(state.number for state in states if f"{STAGES[-1]}.partial/model/.stage.json" in state.operation)
    chosen = [x for x in states if share >= 1 or x.number % round(1 / share) == 0 or (x.number > last and x.number % 2)]
    trials = [partial(_resumed, world, state) for state in chosen]
    outcome = judged("killed at a file operation", trials, jobs)
    outcome.wrong = wrong + outcome.wrong
    outcome.note = f"{len(told)} operations, {len(states)} of them from a state of its own"
    return outcome


def _unlike(place: Place, world: World) -> list[str]:
    found = facts(place)
    return [name for name in sorted(found.keys() | world.whole.keys()) if found.get(name) != world.whole.get(name)]


def _resumed(world: World, state: State) -> list[str]:
    place = world.place(f"operation-{state.number}").filled(state.copy)
    wrong = ends_alike(place, world.run(place), world.whole)
    if not wrong:
        shutil.rmtree(place.folder)
    return [f"operation {state.number} ({state.operation}): {x}" for x in wrong]


CHANGE = "stages.3.backend={use: onnx_int8, per_channel: false}"


def changes(world: World, share: float, jobs: int) -> Outcome:
    """A finished run whose last stage is made anew by another recipe, killed; then that one again, or the first."""
    place = world.place("watched-change").filled(world.folder / "reference")
    _, states = recorded(place, world.run(place, CHANGE), world.folder / "states-change")
    changed = facts(place)
    trials: list[Callable[[], list[str]]] = []
    for state in states:
        if share >= 1 or state.number % round(1 / share) == 0:
            trials.append(partial(_again, world, state, (CHANGE,), changed))
            trials.append(partial(_again, world, state, (), world.whole))
    return judged("killed while a finished run is changed; then the same or the first recipe", trials, jobs)


def _again(world: World, state: State, recipe: tuple[str, ...], expected: dict[str, Any]) -> list[str]:
    place = world.place(f"change-{state.number}-{len(recipe)}").filled(state.copy)
    wrong = ends_alike(place, world.run(place, *recipe), expected)
    if not wrong:
        shutil.rmtree(place.folder)
    return [f"operation {state.number} ({state.operation}), then {recipe or 'the first recipe'}: {x}" for x in wrong]
