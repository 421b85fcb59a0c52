"""Fuzzes the reading of data files: `python -m tests.soak.data --examples 2000`."""

from __future__ import annotations

import argparse
import random

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests import fuzz_data

SHOWN = 5
"""Faults that are printed in full."""


def main(arguments: list[str] | None = None) -> int:
    """Tries so many files and prints how many were read or refused as they should be; 1 where any was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None, help="the same seed tries the same files")
    options = parser.parse_args(arguments)
    number = random.randrange(2**32) if options.seed is None else options.seed
    tried, faults = 0, list[tuple[fuzz_data.Made, str]]()

    @seed(number)
    @settings(
        max_examples=options.examples,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzz_data.files())
    def look(made: fuzz_data.Made) -> None:
        nonlocal tried
        fault, tried = fuzz_data.fault_of(made), tried + 1
        if fault:
            faults.append((made, fault))

    look()
    for made, fault in faults[:SHOWN]:
        print(f"{made.suffix} ({made.encoding}) {made.content[:500]!r}\n{fault}\n")
    right = tried - len(faults)
    print(f"data files: {tried} tried, {right} as they should be, {len(faults)} not (seed {number})")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
