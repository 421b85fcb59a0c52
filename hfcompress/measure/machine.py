"""Finds out if the machine did other work while models were timed.

It looks at two things. *Other work* is the processors' time less the time of our own processes. It also sees work in
another container, and work that leaves us a processor but takes its caches and clock speed. *Waiting* is the time that
a model's threads were ready to run and had no processor. It also shows other work if a container hides the rest of the
machine. Our own idle processes change neither, and neither do more threads than processors.

The load average and `/proc/pressure/cpu` decide nothing, because both count our own threads too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hfcompress.utils.processors import permitted_processors, throttled_seconds

OTHERS = 0.10
"""A machine is busy if other work takes at least this share of the processors' time.

One busy process takes 0.5 of two processors and 0.125 of eight. On a quiet machine with two processors the share was at
most 0.01 for every model."""
WAITED = 0.15
"""A machine is busy if a model's thread waits for a processor for at least this share of the time.

On a quiet machine with two processors the share was at most 0.01 for a model of 20 million parameters. For a model
whose batch takes 0.2 ms it was up to 0.07, because its threads and the process that calls it share two processors and
wake each other. Beside one busy process it was 0.45 to 0.5. Four threads on these two processors waited for each other
0.17 to 0.6 of the time; `state` leaves such turns out."""
STOLEN = 0.05
"""A machine is busy if the hypervisor gives this share of its processors' busy time, or more, to others."""
THROTTLED = 0.05
"""A machine counts as busy if a CPU quota stops our processes for at least this share of the time."""
TICK = 0.01
"""Unit, in seconds, in which the system counts a processor's time; smaller amounts may show as 0."""
SLICE = 0.01
"""Seconds of waiting that count as 0: one turn of another thread must not decide about a short measurement."""


@dataclass(frozen=True)
class Turn:
    """One run of a model over its batches, and the processor time of that run.

    Attributes:
        seconds: Time of each batch.
        threads: Threads of one operator.
        wall: Seconds that the whole run took.
        cpu: Processor seconds of all threads of the process.
        waited: Seconds in the run queue, of the thread that waited longest; None if the system does not show them.
        involuntary: Number of involuntary context switches: the system took the processor away from a thread.
    """

    seconds: Sequence[float]
    threads: int
    wall: float
    cpu: float
    waited: float | None
    involuntary: int


@dataclass(frozen=True)
class Span:
    """The counters of the processors that this process may use, since the system's start or between two moments.

    Attributes:
        wall: Seconds by the clock.
        processors: Number of processors.
        used: Seconds that they were not idle, summed over the processors.
        own: Processor seconds of our own processes.
        stolen: Seconds that a hypervisor gave to other machines while there was work here.
        throttled: Seconds that a CPU quota stopped our processes.
    """

    wall: float
    processors: int
    used: float
    own: float
    stolen: float
    throttled: float

    def since(self, before: Span) -> Span:
        """Subtracts the counters of an earlier moment."""
        return Span(
            self.wall - before.wall,
            self.processors,
            self.used - before.used,
            self.own - before.own,
            self.stolen - before.stolen,
            self.throttled - before.throttled,
        )


def read_counters(pids: Collection[int] = ()) -> Span:
    """Reads the counters of this moment.

    Args:
        pids: Our other processes.
    """
    import psutil

    numbers, each = permitted_processors(), psutil.cpu_times(percpu=True)
    times = [each[number] for number in numbers if number < len(each)]
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")  # `user` holds what guests use
    own = [psutil.Process(pid).cpu_times() for pid in {os.getpid(), *pids}]
    return Span(
        wall=time.perf_counter(),
        processors=len(numbers),
        used=sum(getattr(row, kind, 0.0) for row in times for kind in kinds),
        own=sum(row.user + row.system for row in own),
        stolen=sum(getattr(row, "steal", 0.0) for row in times),
        throttled=throttled_seconds(),
    )


_BOUNDS = {
    "other_share": (OTHERS, "other work took {share:.0%} of the processors' time"),
    "wait_share": (WAITED, "a model's threads waited for a processor {share:.0%} of the time"),
    "stolen_share": (STOLEN, "the hypervisor gave {share:.0%} of the processors' time to other machines"),
    "throttled_share": (THROTTLED, "the CPU quota held the models back {share:.0%} of the time"),
}
"""The share from which a machine is busy, and the message for it."""


def state(spans: Sequence[Span], turns: Sequence[Turn], load: float | None = None) -> dict[str, Any]:
    """Decides if the machine was busy, from the counters; returns the report's entry for the machine.

    Args:
        spans: The times in which models took turns on the processors; empty if all models ran on a GPU.
        turns: All turns of all models.
        load: The load average of the last minute, for the report.

    Returns:
        `busy`; `why`, a sentence for each share that reaches its bound; the shares, None if the system does not show
        them; `involuntary_per_s`, the involuntary context switches per second; `load`.
    """
    processors, wall = max((span.processors for span in spans), default=None), sum(turn.wall for turn in turns)
    # More threads than processors wait for each other: that is no sign of other work.
    fitting = [turn for turn in turns if processors is None or turn.threads <= processors]
    shares = {
        "other_share": _share([(s.used - s.own - TICK * s.processors, s.wall * s.processors) for s in spans]),
        "wait_share": _share([(_waiting_seconds(turn), turn.wall) for turn in fitting], SLICE),
        "stolen_share": _share([(s.stolen - TICK * s.processors, s.used) for s in spans]),
        "throttled_share": _share([(s.throttled, s.wall) for s in spans]),
    }
    why = [
        said.format(share=share)
        for name, (bound, said) in _BOUNDS.items()
        if (share := shares[name]) is not None and share >= bound
    ]
    told = shares | {"wait_share": _share([(_waiting_seconds(turn), turn.wall) for turn in turns])}
    return {
        "busy": bool(why),
        "why": why,
        **{name: share if share is None else round(share, 4) for name, share in told.items()},
        "involuntary_per_s": round(sum(turn.involuntary for turn in turns) / wall, 1) if wall else None,
        "load": load if load is None else round(load, 2),
    }


def judge_all(parts: Sequence[tuple[Sequence[Span], Sequence[Turn]]]) -> dict[str, Any]:
    """Combines several measurements: the machine was busy if it was busy in any of them."""
    spans = [span for part, _ in parts for span in part]
    whole = state(spans, [turn for _, part in parts for turn in part], read_load_average())
    reasons = whole["why"] or [why for part in parts for why in state(*part)["why"]]
    return {**whole, "busy": bool(reasons), "why": list(dict.fromkeys(reasons))}


def _waiting_seconds(turn: Turn) -> float | None:
    """Returns the seconds that a turn waited; without a run queue, the time that its only thread did not run."""
    if turn.waited is None and turn.threads == 1:
        return max(turn.wall - turn.cpu, 0.0)
    return turn.waited


def _share(parts: Sequence[tuple[float | None, float]], unseen: float = 0.0) -> float | None:
    """Divides the sum of the first values, less `unseen`, by the sum of the second; None if a first value is None."""
    whole = sum(second for _, second in parts)
    known = [max(first, 0.0) for first, _ in parts if first is not None]
    if not whole or len(known) < len(parts):
        return None
    return min(max(sum(known) - unseen, 0.0) / whole, 1.0)


def read_load_average() -> float | None:
    """Returns the load average of the last minute, which counts our own processes too; None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def find_other_work(before: Span) -> str:
    """Names the reasons why the machine was busy since a moment; empty if it was quiet."""
    return "; ".join(state([read_counters().since(before)], [])["why"])


def watch_machine(seconds: float = 0.3) -> str:
    """Watches the machine while this process does nothing, and says in words if it is busy."""
    before = read_counters()
    time.sleep(seconds)
    why = find_other_work(before)
    return f"busy: {why}, so times that are measured now would mean little" if why else "quiet: models can be timed"
