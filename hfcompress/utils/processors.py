"""Which processors this process may use, and so how many threads are worth starting."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def default_threads(system: Path = ROOT) -> int:
    """The threads of one operator: one for each processor that this process may use, at most `OMP_NUM_THREADS`.

    CPU affinity bounds it, and so does a container's CPU quota, of which whole processors count: a thread that may run
    for half of the time holds up all the others.

    Args:
        system: Where `/proc` and the control groups are.
    """
    quota, asked = cpu_quota(system), _asked()
    counts = [len(permitted()), *([int(quota)] if quota is not None else []), *([asked] if asked else [])]
    return max(min(counts), 1)


def thread_counts(most: int) -> list[int]:
    """Thread counts worth trying: one, the powers of two, and `most`."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


def permitted() -> list[int]:
    """The numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _asked() -> int | None:
    """`OMP_NUM_THREADS`: its first number, of the outermost level; None where it says none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def cpu_quota(system: Path = ROOT) -> float | None:
    """How many processors' time the control groups grant this process; None where they set no limit."""
    quotas = [quota for folder in control_groups(system) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    """The quota of one control group, of version 2 (`cpu.max`) or 1 (`cpu.cfs_quota_us`)."""
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
    """How long a CPU quota has held this process's control groups back so far; 0 where there is none."""
    found = [0.0]
    for folder in control_groups(system):
        facts = dict(line.split() for line in _read(folder / "cpu.stat").splitlines() if len(line.split()) == 2)
        found.append(int(facts.get("throttled_usec", 0)) / 1e6 + int(facts.get("throttled_time", 0)) / 1e9)
    return max(found)


def control_groups(system: Path = ROOT) -> Iterator[Path]:
    """The directories of the CPU control groups that this process is in, from its own to the outermost seen here.

    A container may show its own group as the root of the mount, whatever path `/proc/self/cgroup` names.
    """
    own = dict(_memberships(system))
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


def _memberships(system: Path) -> Iterator[tuple[int, str]]:
    """The version of each hierarchy that may limit processors, and the group's path in it."""
    for line in _read(system / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _below(path: str, root: str) -> list[str]:
    """The parts of a group's path below the root of a mount; none where the mount shows another part of the tree."""
    parts, above = ([part for part in text.split("/") if part] for text in (path, root))
    return parts[len(above) :] if parts[: len(above)] == above and ".." not in parts else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
