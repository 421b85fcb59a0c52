"""A run on two processes, one of which is killed: the other ends soon and says so, and the same command goes on."""

from __future__ import annotations

import signal
import socket
import time
from functools import partial
from typing import Any

from tests.soak.harness import Outcome, Place, World, command, differences, draw, facts, judged, wait

BOUND = 60
"""Seconds within which the process that is left has to end."""
CHANGES = ("stages.0.train.batch_size=8", "stages.1.train.batch_size=8", "stages.2.recover.batch_size=8")


def ranks(world: World, count: int, seed: int, jobs: int) -> Outcome:
    """So many runs on two processes, with one of them killed at a random moment."""
    place = world.place("ranks").filled(None)
    codes, seconds = _both(world, place)
    assert codes == [0, 0], place.said()[-3000:]
    whole = facts(place)
    trials = [partial(_killed, world, whole, seconds, seed, number) for number in range(count)]
    return judged("two processes, one killed", trials, jobs)


def _started(world: World, place: Place) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"ACCELERATE_USE_CPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [command(world.run(place, *CHANGES), place, **shared, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


def _both(world: World, place: Place) -> tuple[list[Any], float]:
    """Runs both processes to their end; their exit codes and the first one's processor time."""
    ended = [wait(pid) for pid in _started(world, place)]
    return [code for code, _ in ended], ended[0][1]


def _killed(world: World, whole: dict[str, Any], seconds: float, seed: int, number: int) -> list[str]:
    random, place = draw(seed, "ranks", number), world.place(f"ranks-{number}").filled(None)
    pids, victim = _started(world, place), number % 2
    code, _ = wait(pids[victim], at=random.uniform(0.1, 0.9) * seconds)
    start = time.monotonic()
    left, _ = wait(pids[1 - victim], BOUND)
    took, said = time.monotonic() - start, place.said()
    wrong = []
    if code == -signal.SIGKILL:
        if left == "hangs":
            wrong.append(f"process {1 - victim} went on for {took:.0f} s")
        # The second one may be killed when it has done its share.
        elif left != 0 and (left != 1 or "another process of this run ended" not in said):
            wrong.append(f"process {1 - victim} ended with {left}")
        if "Traceback" in said:
            wrong.append("a traceback")
    elif (code, left) != (0, 0):
        wrong.append(f"ended with {code} and {left}")
    if wrong:
        wrong = [f"{', '.join(wrong)}: {said[-3000:]}"]
    codes, _ = _both(world, place)
    wrong += [f"again, it ended with {codes}: {place.said()[-1500:]}"] if codes != [0, 0] else differences(place, whole)
    return [f"trial {number}, process {victim} killed: {x}" for x in wrong]
