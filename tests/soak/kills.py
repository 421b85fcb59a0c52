"""Runs killed at random moments, some of them several times in a row, then resumed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from functools import partial

from tests.soak.harness import Outcome, World, command, draw, ends_alike, judged, wait


def kills(world: World, count: int, seed: int, jobs: int) -> Outcome:
    """So many kills -9; each run is killed one to three times before it is left alone."""
    trials: list[Callable[[], list[str]]] = []
    left, number = count, 0
    while left > 0:
        times = min(left, draw(seed, "times", number).choice((1, 1, 2, 3)))
        trials.append(partial(_killed, world, seed, number, times))
        left, number = left - times, number + 1
    outcome = judged("killed (-9) at a random moment", trials, jobs)
    outcome.tried, outcome.note = count, f"{len(trials)} runs"
    return outcome


def _killed(world: World, seed: int, number: int, times: int) -> list[str]:
    random, place = draw(seed, "kill", number), world.place(f"kill-{number}").filled(None)
    for _ in range(times):
        at = random.uniform(0.05, 0.95) * world.seconds
        code, _ = wait(command(world.run(place), place), at=at)
        if code not in (0, -signal.SIGKILL):
            return [f"trial {number}: the run ended with {code} before it was killed: {place.said()[-1500:]}"]
    return [f"trial {number}, killed {times} times: {x}" for x in ends_alike(place, world.run(place), world.whole)]


def interrupts(world: World, count: int, seed: int, jobs: int) -> Outcome:
    """^C and SIGTERM at random moments: one line, and the same command goes on."""
    trials = [partial(_interrupted, world, seed, number) for number in range(count)]
    return judged("^C or SIGTERM at a random moment", trials, jobs)


def _interrupted(world: World, seed: int, number: int) -> list[str]:
    random, place = draw(seed, "interrupt", number), world.place(f"interrupt-{number}").filled(None)
    sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
    code, _ = wait(command(world.run(place), place), at=random.uniform(0.05, 0.95) * world.seconds, number=sent)
    said = place.said()
    done = "final/README.md" in said  # what comes after that is the interpreter's end
    wrong = [] if code in (0, 128 + sent) or (done and code == -sent) else [f"ended with {code}"]
    if code != 0 and not done and said.count("error: interrupted; the same command goes on from here") != 1:
        wrong.append("does not say that it was interrupted")
    if "Traceback" in said:
        wrong.append("a traceback")
    if wrong:
        return [f"trial {number}, signal {sent}: {', '.join(wrong)}: {said[-1500:]}"]
    return [f"trial {number}, signal {sent}: {x}" for x in ends_alike(place, world.run(place), world.whole)]


def removals(world: World, count: int, seed: int, jobs: int) -> Outcome:
    """The run directory is removed or renamed at a random moment: it is said, and not made again."""
    trials = [partial(_removed, world, seed, number) for number in range(count)]
    return judged("the run directory removed or renamed meanwhile", trials, jobs)


def _removed(world: World, seed: int, number: int) -> list[str]:
    random, place = draw(seed, "remove", number), world.place(f"remove-{number}").filled(None)

    def remove() -> None:
        place.run.rename(place.folder / "moved")
        if number % 2:
            shutil.rmtree(place.folder / "moved")

    at = random.uniform(0.2, 0.8) * world.seconds
    code, _ = wait(command(world.run(place), place), at=at, action=remove)
    said, moved = place.said(), place.folder / "moved"
    wrong = []
    if code != 2 or said.count("was removed or moved while this run wrote to it") != 1 or "Traceback" in said:
        wrong.append(f"ended with {code}: {said[-1500:]}")
    if place.run.exists():
        wrong.append(f"there is a new directory with {sorted(x.name for x in place.run.iterdir())}")
    if moved.exists():  # the same command goes on in the directory that was renamed
        shutil.rmtree(place.run, ignore_errors=True)
        moved.rename(place.run)
    return [f"trial {number}: {x}" for x in wrong or ends_alike(place, world.run(place), world.whole)]
