"""Two runs in one directory: the second is refused, naming the first, and the first ends as if it had been alone."""

from __future__ import annotations

import time
from functools import partial

from tests.soak.harness import Outcome, Place, World, command, differences, draw, ends_alike, judged, wait

CHANGE = "stages.1.train.learning_rate=0.002"
REFUSED = "error: another run writes to"


def twice(world: World, count: int, seed: int, jobs: int) -> Outcome:
    """The same command twice, and with another value, the second at a random moment of the first."""
    trials = [partial(_two, world, seed, number) for number in range(count)]
    return judged("two runs at once in one directory", trials, jobs)


def _two(world: World, seed: int, number: int) -> list[str]:
    place = world.place(f"twice-{number}").filled(None)
    other = () if number % 2 else (CHANGE,)
    second_place = world.place(f"twice-{number}-log")  # a log of its own
    first = command(world.run(place), place)
    time.sleep(draw(seed, "twice", number).uniform(0, 1.2) * world.seconds if number % 4 else 0)
    link = place.folder / "link"
    if number % 3 == 0:  # the same directory by another name
        place.run.mkdir(exist_ok=True)
        link.symlink_to(place.run)
    arguments = world.run(place, *other)
    if link.exists():
        arguments = [link if argument == place.run else argument for argument in arguments]
    second = command(arguments, second_place, HFCOMPRESS_HOME=str(place.home), TMPDIR=str(place.folder / "tmp"))
    ended = wait(second)[0]
    code = wait(first)[0]
    link.unlink(missing_ok=True)
    said = second_place.said()
    if code == 2 and ended == 0 and REFUSED in place.said():  # the second was the quicker one
        return _checked(number, place, world, other)
    if code != 0:
        return [f"trial {number}: the first ended with {code}: {place.said()[-1500:]}"]
    if ended == 2:
        if REFUSED not in said or f"process {first} on " not in said:
            return [f"trial {number}: the second did not name the first, process {first}: {said[-1500:]}"]
        wrong = [f"trial {number}: {x}" for x in differences(place, world.whole)]
        return wrong + [f"trial {number}, again: {x}" for x in ends_alike(place, world.run(place), world.whole)]
    if ended == 0 and "01-finetune: done before" in said:  # the first had ended before
        return _checked(number, place, world, other)
    return [f"trial {number}: the second ended with {ended}: {said[-1500:]}"]


def _checked(number: int, place: Place, world: World, other: tuple[str, ...]) -> list[str]:
    """What is wrong after the second one ran to its end; caches of both recipes may be there."""
    wrong = differences(place, world.whole_with(f"changed-{number}", *other) if other else world.whole)
    return [f"trial {number}: {x}" for x in wrong if not x.startswith("home/")]
