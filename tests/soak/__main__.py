"""Everything that may befall a run, tried and counted: `python -m tests.soak`, `--quick` for a minute of it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.soak import disk, harness, kills, operations, ranks, torn, twice
from tests.soak.harness import Outcome, World

BEGIN, END = "<!-- the last run -->", "<!-- the end of the last run -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all kinds, or those that are named; prints a table, and returns 1 where anything is not as it should."""
    options = _options(arguments)
    print(f"seed {options.seed}, {options.jobs} at once", flush=True)
    outcomes: list[Outcome] = []
    folder = None
    try:
        for kind, run in _kinds(options).items():
            if options.only and kind not in options.only:
                continue
            if kind not in OTHERS and folder is None:
                folder = harness.prepare()
                world = harness.make(folder)
            start = time.monotonic()
            outcome = run() if kind in OTHERS else run(world)
            outcome.seconds = outcome.seconds or time.monotonic() - start
            outcomes.append(outcome)
            print(row(outcome), flush=True)
    finally:
        if folder is not None and not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    text = table(outcomes, options.seed)
    print(f"\n{text}")
    if options.write is not None:
        write(options.write, text)
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a minute of it")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="repeats the moments of a run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trials at once")
    parser.add_argument("--only", nargs="*", help="kinds: " + " ".join(DEFAULTS))
    parser.add_argument("--keep", action="store_true", help="leave the folder of the trials")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into a Markdown file")
    for kind, (whole, quick) in DEFAULTS.items():
        parser.add_argument(f"--{kind}", type=float, metavar="N", help=f"default {whole:g}, with --quick {quick:g}")
    options = parser.parse_args(arguments)
    for kind, sizes in DEFAULTS.items():
        if getattr(options, kind) is None:
            setattr(options, kind, sizes[options.quick])
    return options


DEFAULTS: dict[str, tuple[float, float]] = {
    "kills": (50, 1),
    "interrupts": (10, 1),
    "removals": (6, 1),
    "operations": (1, 0.01),
    "changes": (1, 0),
    "torn": (0.2, 0.01),
    "disk": (1, 0.05),
    "twice": (12, 2),
    "ranks": (10, 0),
    "recipes": (100_000, 0),
    "data": (2_000, 0),
    "push": (1, 0),
}
"""How many, or which share, of each kind: in a whole soak and in a quick one."""
OTHERS = ("recipes", "data", "push")
"""Kinds that are programs of their own."""


def _kinds(options: argparse.Namespace) -> dict[str, Callable[..., Outcome]]:
    seed, jobs = options.seed, options.jobs
    kinds: dict[str, Callable[..., Outcome]] = {
        "kills": lambda world: kills.kills(world, int(options.kills), seed, jobs),
        "interrupts": lambda world: kills.interrupts(world, int(options.interrupts), seed, jobs),
        "removals": lambda world: kills.removals(world, int(options.removals), seed, jobs),
        "operations": lambda world: operations.operations(world, options.operations, jobs),
        "changes": lambda world: operations.changes(world, options.changes, jobs),
        "torn": lambda world: torn.torn(world, _moments(world), options.torn, seed, jobs),
        "disk": lambda world: disk.disk(world, options.disk, seed, jobs),
        "twice": lambda world: twice.twice(world, int(options.twice), seed, jobs),
        "ranks": lambda world: ranks.ranks(world, int(options.ranks), seed, max(1, jobs // 2)),
    }
    for name, title in (("recipes", "fuzzed recipes"), ("data", "data files"), ("push", "push faults")):
        examples = [] if name == "push" else ["--examples", f"{int(getattr(options, name))}"]
        kinds[name] = lambda name=name, title=title, examples=examples: program(name, title, examples)
    return {kind: run for kind, run in kinds.items() if getattr(options, kind) > 0}


def _moments(world: World) -> list[Path]:
    """Copies of the run in the middle of its first and of its third stage."""
    store = world.folder / "states"
    if not store.is_dir():
        place = world.place("watched").filled(None)
        operations.recorded(place, world.run(place), store)
    numbers = sorted(int(path.name) for path in store.iterdir() if path.name.isdecimal())
    found = []
    for mark in ("01-finetune.partial/checkpoints/checkpoint-12", "03-prune.partial/checkpoints/checkpoint-6"):
        found.append(next(store / f"{n}" for n in numbers if (store / f"{n}/run/{mark}/trainer_state.json").is_file()))
    return found


def program(name: str, title: str, arguments: Sequence[str]) -> Outcome:
    """Runs a kind that is a program of its own; its last line counts what it tried, what was right and what was not."""
    module = f"tests.soak.{name}"
    if importlib.util.find_spec(module) is None:
        return Outcome(title, note=f"not tried: there is no {module}")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    printed = done.stdout.strip() or done.stderr.strip()
    counts = [int(x.replace(",", "")) for x in re.findall(r"[\d,]*\d", printed.splitlines()[-1])] if printed else []
    outcome = Outcome(title, counts[0] if counts else 0, seconds=time.monotonic() - start)
    wrong = counts[2] if len(counts) > 2 else 0
    if done.returncode != 0 or wrong:
        print(f"NOT AS IT SHOULD ({title}):\n{printed[-6000:]}\n{done.stderr[-6000:]}", flush=True)
        outcome.wrong = [printed[-2000:]] * max(wrong, 1)
    return outcome


def row(outcome: Outcome) -> str:
    """One line of the table."""
    right = outcome.tried - len(outcome.wrong)
    note = f" ({outcome.note})" if outcome.note else ""
    return f"| {outcome.kind}{note} | {outcome.tried:,} | {right:,} | {len(outcome.wrong):,} | {outcome.seconds:,.0f} |"


def table(outcomes: Sequence[Outcome], seed: int) -> str:
    """All lines, and what they were counted on."""
    from hfcompress.measure.environment import cpu_name, versions

    head = ["| kind | tried | as it should | not | seconds |", "|---|---|---|---|---|"]
    known = versions()
    where = (
        f"{datetime.now(UTC):%Y-%m-%d}, seed {seed}, on {cpu_name()} ({os.cpu_count()} cores), Python "
        f"{platform.python_version()}, torch {known['torch']}, transformers {known['transformers']}"
    )
    return "\n".join([*head, *map(row, outcomes)]) + f"\n\n{where}"


def write(path: Path, text: str) -> None:
    """Puts the table between its marks in a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
