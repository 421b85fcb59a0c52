"""The time of `hfcompress --help`: target 0.5 s on an idle core. `--quick` runs it fewer times."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

TARGET = 0.5


def seconds() -> float:
    """Times one run, as a whole process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hfcompress", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints the median and its ratio to the target."""
    seconds()  # writes the byte code
    runs = [seconds() for _ in range(5 if "--quick" in sys.argv else 15)]
    median = statistics.median(runs)
    print(f"hfcompress --help: median {median:.3f} s, min {min(runs):.3f}, max {max(runs):.3f} of {len(runs)} runs")
    print(f"ratio: {median / TARGET:.2f} (target at most 1)")


if __name__ == "__main__":
    main()
