"""Finds the processors that this process may use, and the number of threads for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def default_threads(system: Path = ROOT) -> int:
    """Counts the threads of one operator: one for each processor that this process may use, at most `OMP_NUM_THREADS`.

    CPU affinity limits the number, and so does a container's CPU quota, rounded down to whole processors: a thread that
    may run for half of the time holds up all the others.

    Args:
        system: The root directory, with `/proc` and the control groups.
    """
    quota, asked = cpu_quota(system), _read_omp_threads()
    counts = [len(permitted_processors()), *([int(quota)] if quota is not None else []), *([asked] if asked else [])]
    return max(min(counts), 1)


def thread_counts(most: int) -> list[int]:
    """Lists the thread counts to try: the powers of two up to `most`, and `most`."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def permitted_processors() -> list[int]:
    """Lists the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _read_omp_threads() -> int | None:
    """Reads the first number of `OMP_NUM_THREADS`, for the outermost level; None if there is none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def cpu_quota(system: Path = ROOT) -> float | None:
    """Reads the CPU quota of the control groups, in processors; None if there is no limit."""
    quotas = [quota for folder in control_groups(system) if (quota := _read_quota(folder)) is not None]
    return min(quotas, default=None)


def _read_quota(folder: Path) -> float | None:
    """Reads the quota of one control group, of version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`)."""
    both = _read(folder / "cpu.max").split() or [
        *_read(folder / "cpu.cfs_quota_us").split(),
        *_read(folder / "cpu.cfs_period_us").split(),
    ]
    try:
        quota, period = (int(number) for number in both)
    except ValueError:  # "max", or nothing there
        return None
    return quota / period if quota > 0 and period > 0 else None


def throttled_seconds(system: Path = ROOT) -> float:
    """Reads the seconds that a CPU quota has stopped this process's control groups so far; 0 without a quota."""
    found = [0.0]
    for folder in control_groups(system):
        facts = dict(line.split() for line in _read(folder / "cpu.stat").splitlines() if len(line.split()) == 2)
        found.append(int(facts.get("throttled_usec", 0)) / 1e6 + int(facts.get("throttled_time", 0)) / 1e9)
    return max(found)


def control_groups(system: Path = ROOT) -> Iterator[Path]:
    """Finds the directories of this process's CPU control groups, from its own group to the outermost visible one.

    A container may show its own group as the root of the mount, even if `/proc/self/cgroup` names another path.
    """
    own = dict(_read_memberships(system))
    for line in _read(system / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, *_, options = right.split() or ("", "")
        version = 2 if kind == "cgroup2" else 1 if kind == "cgroup" and "cpu" in options.split(",") else 0
        if version not in own:
            continue
        root, mount = left.split()[3:5]
        place = system / mount.lstrip("/")
        inside = _below(own[version], root)
        yield from (place.joinpath(*inside[:depth]) for depth in range(len(inside), -1, -1))


def _read_memberships(system: Path) -> Iterator[tuple[int, str]]:
    """Yields the version of each hierarchy that may limit processors, and the group's path in it."""
    for line in _read(system / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _below(path: str, root: str) -> list[str]:
    """Returns the parts of a group's path below the root of a mount; none if the mount shows another subtree."""
    parts, above = ([part for part in text.split("/") if part] for text in (path, root))
    return parts[len(above) :] if parts[: len(above)] == above and ".." not in parts else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
