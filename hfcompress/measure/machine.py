"""Whether the machine did other work while models were timed.

Two things are looked at. *Other work* is what the processors did, less what our own processes did: it counts also where
it runs in another container, and where it leaves us a processor but not its caches and its clock. *Waiting* is how long
a model's threads were ready to run and had no processor: it shows other work also where a container hides the rest of
the machine. Neither is moved by our own idle processes, nor by more threads than there are processors.

The load average and `/proc/pressure/cpu` decide nothing, since both count our own threads too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hfcompress.utils.processors import permitted, throttled_seconds

OTHERS = 0.10
"""Share of the processors' time from which other work makes a machine busy.

One busy process takes 0.5 of two processors and 0.125 of eight. On a quiet machine of two processors it was 0.01 at
most, whatever ran."""
WAITED = 0.15
"""Share of the time that a model's thread waits for a processor from which a machine is busy.

On a quiet machine of two processors it was 0.01 at most for a model of 20 million parameters. For one whose batch takes
0.2 ms it was up to 0.07: its threads and the process that asks it share two processors, and wake each other. Beside one
busy process it was 0.45 to 0.5. Four threads on these two processors waited 0.17 to 0.6 of the time for each other: see
`state`."""
STOLEN = 0.05
"""Share of the processors' busy time from which what the hypervisor gives to other machines makes this one busy."""
THROTTLED = 0.05
"""Share of the time that a CPU quota holds us back from which figures are the quota's, not the models'."""
TICK = 0.01
"""Seconds in which the system counts a processor's time; less than one on each processor cannot be told from none."""
SLICE = 0.01
"""Seconds of waiting that count as none: a turn of some other thread, which a short measurement is not judged by."""


@dataclass(frozen=True)
class Turn:
    """A model run once over its batches, and what it used meanwhile.

    Attributes:
        seconds: Of each batch.
        threads: Of one operator.
        wall: Seconds that all of it took.
        cpu: Processor seconds of all the process's threads.
        waited: Seconds in the run queue of the thread that stood there for longest; None where the system tells none.
        involuntary: How often a thread was made to leave its processor.
    """

    seconds: Sequence[float]
    threads: int
    wall: float
    cpu: float
    waited: float | None
    involuntary: int


@dataclass(frozen=True)
class Span:
    """What the processors that this process may use did between two moments; of one moment, since the system started.

    Attributes:
        wall: Seconds.
        processors: How many there are.
        used: Seconds that they were not idle, added up.
        own: Seconds that our processes used of them.
        stolen: Seconds that a hypervisor gave to other machines while there was work here.
        throttled: Seconds that a CPU quota held us back.
    """

    wall: float
    processors: int
    used: float
    own: float
    stolen: float
    throttled: float

    def since(self, before: Span) -> Span:
        """From an earlier moment to this one."""
        return Span(
            self.wall - before.wall,
            self.processors,
            self.used - before.used,
            self.own - before.own,
            self.stolen - before.stolen,
            self.throttled - before.throttled,
        )


def moment(pids: Collection[int] = ()) -> Span:
    """This moment.

    Args:
        pids: Our processes beside this one.
    """
    import psutil

    numbers, each = permitted(), psutil.cpu_times(percpu=True)
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
"""From which share on a machine is busy, and what is said of it then."""


def state(spans: Sequence[Span], turns: Sequence[Turn], load: float | None = None) -> dict[str, Any]:
    """What the report says of the machine.

    Args:
        spans: In which models took turns on the processors; none where all of them ran on a GPU.
        turns: All turns of all models.
        load: The load average of the last minute, to be told.

    Returns:
        `busy`; `why`, a sentence for each share that reaches its bound; the shares, None where the system does not tell
        them; `involuntary_per_s`, how often threads were made to leave a processor; `load`.
    """
    processors, wall = max((span.processors for span in spans), default=None), sum(turn.wall for turn in turns)
    # Threads that outnumber the processors wait for each other, which tells nothing of other work.
    fitting = [turn for turn in turns if processors is None or turn.threads <= processors]
    shares = {
        "other_share": _share([(s.used - s.own - TICK * s.processors, s.wall * s.processors) for s in spans]),
        "wait_share": _share([(_waited(turn), turn.wall) for turn in fitting], SLICE),
        "stolen_share": _share([(s.stolen - TICK * s.processors, s.used) for s in spans]),
        "throttled_share": _share([(s.throttled, s.wall) for s in spans]),
    }
    why = [
        said.format(share=share)
        for name, (bound, said) in _BOUNDS.items()
        if (share := shares[name]) is not None and share >= bound
    ]
    told = shares | {"wait_share": _share([(_waited(turn), turn.wall) for turn in turns])}
    return {
        "busy": bool(why),
        "why": why,
        **{name: share if share is None else round(share, 4) for name, share in told.items()},
        "involuntary_per_s": round(sum(turn.involuntary for turn in turns) / wall, 1) if wall else None,
        "load": load if load is None else round(load, 2),
    }


def state_over(parts: Sequence[tuple[Sequence[Span], Sequence[Turn]]]) -> dict[str, Any]:
    """The state over several measurements: busy where it was in any, since a quiet one makes no other one right."""
    spans = [span for part, _ in parts for span in part]
    whole = state(spans, [turn for _, part in parts for turn in part], load_average())
    reasons = whole["why"] or [why for part in parts for why in state(*part)["why"]]
    return {**whole, "busy": bool(reasons), "why": list(dict.fromkeys(reasons))}


def _waited(turn: Turn) -> float | None:
    """Seconds that a turn waited; where the queue is not told, what one thread alone did not run."""
    if turn.waited is None and turn.threads == 1:
        return max(turn.wall - turn.cpu, 0.0)
    return turn.waited


def _share(parts: Sequence[tuple[float | None, float]], unseen: float = 0.0) -> float | None:
    """The first values' sum, less what cannot be told from none, by that of the second; None where one is None."""
    whole = sum(second for _, second in parts)
    known = [max(first, 0.0) for first, _ in parts if first is not None]
    if not whole or len(known) < len(parts):
        return None
    return min(max(sum(known) - unseen, 0.0) / whole, 1.0)


def load_average() -> float | None:
    """Processes that ran or wanted to, on average over the last minute, ours among them; None where it is not told."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def other_work(before: Span) -> str:
    """What made the machine busy since a moment; empty where nothing did."""
    return "; ".join(state([moment().since(before)], [])["why"])


def just_now(seconds: float = 0.3) -> str:
    """Whether the machine is busy, for people: it is watched for a while in which this process does nothing."""
    before = moment()
    time.sleep(seconds)
    why = other_work(before)
    return f"busy: {why}, so times that are measured now would mean little" if why else "quiet: models can be timed"
