"""Files of a run and of its caches that are cut off, emptied or gone, as a power cut or a bad disk leaves them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.soak.harness import Outcome, World, command, differences, draw, ends_alike, judged, wait

WAYS = ("missing", "empty", "half")


def torn(world: World, states: list[Path], share: float, seed: int, jobs: int) -> Outcome:
    """Each file of some states, damaged in each way: made anew, or refused by name; never taken for whole.

    Args:
        world: The world.
        states: Copies of runs at some of their moments; the finished run is looked at too.
        share: How many of all cases are tried.
        seed: Draws them.
        jobs: So many at once.
    """
    trials: list[Callable[[], list[str]]] = []
    for number, state in enumerate([*states, world.folder / "reference"]):
        for file in sorted(p for top in ("run", "home") for p in (state / top).rglob("*") if p.is_file()):
            for way in WAYS:
                if draw(seed, "torn", number, file.name, way).random() < share:
                    trials.append(partial(_damaged, world, f"{number}-{len(trials)}", state, file, way))
    return judged("a file cut off, emptied or gone", trials, jobs)


def _damaged(world: World, name: str, state: Path, file: Path, way: str) -> list[str]:
    relative = file.relative_to(state)
    place = world.place(f"torn-{name}").filled(state)
    damaged = place.folder / relative
    if way == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 0 if way == "empty" else damaged.stat().st_size // 2])
    code, _ = wait(command(world.run(place), place))
    wrong: list[str] = []
    if "Traceback" in place.said():
        wrong = ["a traceback: " + place.said()[-1500:]]
    elif code == 0:
        wrong = differences(place, world.whole)
        if relative.parts[0] == "home":  # a cache that a finished run does not read stays as it is
            wrong = [x for x in wrong if not x.startswith(f"{relative}:")]
    elif code != 2 or damaged.name not in place.said():
        wrong = [f"ended with {code}: {place.said()[-1500:]}"]
    elif damaged.parent.parent == place.run:  # a stage that is done: as the error says, it is removed and made anew
        shutil.rmtree(damaged.parent)
        wrong = ends_alike(place, world.run(place), world.whole)
    if not wrong:
        shutil.rmtree(place.folder)
    return [f"{relative} {way}: {x}" for x in wrong]
