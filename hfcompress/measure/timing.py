"""How fast models are: they take turns until the ratio of their times is known, or will not be.

Each lives in a process of its own. What the machine does meanwhile touches all of them alike, as far as it can: an
operator of PyTorch waits for its slowest thread, so other work slows some runtimes more than others. `machine` looks
for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from hfcompress.measure import machine
from hfcompress.measure.machine import Span, Turn
from hfcompress.measure.process import Batch, ModelProcess
from hfcompress.utils.processors import thread_counts
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import numpy as np

MAX_BATCHES = 64
MAX_BATCH = 8192
"""Largest batch size: far above what any use answers at once."""
MAX_ROUNDS = 20
"""Rounds after which an interval that is still wide is reported as such."""
NARROW = 0.05
"""Half the width of an interval, as a share of its ratio, up to which a speed-up is known well enough."""
CONFIDENCE = 0.95
TRIALS, TRIAL_BATCHES = 3, 8
"""How often each thread count is tried, and on how many batches."""


class Latency(StrictModel):
    """How speed is measured."""

    device: Literal["cpu", "cuda"] = "cpu"
    batch_sizes: list[Annotated[int, Field(ge=1, le=MAX_BATCH)]] = Field(default=[1, 32], min_length=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of one operator. By default each PyTorch model runs, at each batch size, on the count at which it is
    fastest, of 1, 2, 4, … and the most that `OMP_NUM_THREADS`, CPU affinity and a container's CPU quota allow; graphs
    run on the most."""
    rounds: int = Field(default=6, ge=1)
    """How often the models take turns at least, and never fewer than 6 times; it goes on until each speed-up's 95%
    interval is within 5% of it, up to 20 times."""
    rows: int = Field(default=256, ge=1)
    """Rows of the judged split that a round runs, in at most 64 batches, each padded to its longest row."""


class Rows(Protocol):
    """Rows as one model reads them."""

    encoded: Sized

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Arrays of each group of rows."""


def timings(
    processes: Sequence[ModelProcess],
    rows: Sequence[Rows],
    options: Latency,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Times all models at each batch size.

    Args:
        processes: The models, the source first.
        rows: What each of them reads.
        options: At which batch sizes, threads and so on.
        seed: Draws the rows.
        progress: Told what is being done.

    Returns:
        For each model an entry a batch size, as in the report; and the state of the machine meanwhile.
    """
    import numpy as np

    found: list[list[dict[str, Any]]] = [[] for _ in processes]
    watched: list[tuple[list[Span], list[Turn]]] = []
    order = np.random.default_rng(seed).permutation(min(len(each.encoded) for each in rows))
    for size in options.batch_sizes:
        groups = _groups(order, size, options.rows)
        lengths = [_prepare(process, each, groups) for process, each in zip(processes, rows, strict=True)]
        threads = [options.threads or fastest_threads(process) for process in processes]
        turns, spans = _rounds(processes, threads, options.rounds, partial(_tell, progress, size))
        watched.append((spans, list(chain.from_iterable(turns))))
        for entries, process, length, own in zip(found, processes, lengths, turns, strict=True):
            same_device = process.device == processes[0].device
            speed = compared(turns[0], own) if same_device else dict.fromkeys(("speedup", "speedup_interval", "narrow"))
            entries.append({**latency(process, size, length, own), **speed})
    return found, machine.state_over(watched)


def _tell(progress: Callable[[str], None], size: int, number: int) -> None:
    progress(f"latency, batch {size}: round {number}")


def _groups(order: np.ndarray[Any, Any], size: int, rows: int) -> list[list[int]]:
    """The rows of each batch."""
    number = min(max(min(rows, len(order)) // size, 1), MAX_BATCHES)
    return [[int(order[i % len(order)]) for i in range(b * size, (b + 1) * size)] for b in range(number)]


def _prepare(process: ModelProcess, rows: Rows, groups: list[list[int]]) -> int:
    """Hands a model its batches, and gives their mean length."""
    import numpy as np

    batches = list(rows.batches(groups))
    process.prepare(batches)
    return round(float(np.mean([batch["input_ids"].shape[1] for batch in batches])))


def fastest_threads(process: ModelProcess) -> int:
    """The thread count at which a model is fastest on its batches, of those that are permitted.

    A small batch on many threads waits more for them than it gains, and whatever is held against it would look fast.
    """
    import numpy as np

    counts = thread_counts(process.threads) if process.chooses_threads else [process.threads]
    if len(counts) == 1:
        return counts[0]
    trials: dict[int, list[float]] = {number: [] for number in counts}
    for _ in range(TRIALS):
        for number, kept in trials.items():
            kept.append(float(np.median(process.time(number, TRIAL_BATCHES).seconds)))
    return min(counts, key=lambda number: min(trials[number]))


def _rounds(
    processes: Sequence[ModelProcess], threads: Sequence[int], least: int, tell: Callable[[int], None]
) -> tuple[list[list[Turn]], list[Span]]:
    """Lets the models take turns until each speed-up is known well enough, or the machine turns out to be busy.

    Returns:
        The turns of each model, and what the processors did meanwhile; the latter is empty where no model ran on them.
    """
    turns: list[list[Turn]] = [[] for _ in processes]
    on_processor = any(process.device == "cpu" for process in processes)
    pids = [process.pid for process in processes]
    least, before, spans = max(least, LEAST_ROUNDS), machine.moment(pids), []
    for number in range(max(least, MAX_ROUNDS)):
        tell(number + 1)
        for index in order_of(len(processes), number):
            turns[index].append(processes[index].time(threads[index]))
        spans = [machine.moment(pids).since(before)] if on_processor else []
        if number + 1 >= least and (_known(processes, turns) or _busy(spans, turns)):
            break
    return turns, spans


def _busy(spans: Sequence[Span], turns: Sequence[Sequence[Turn]]) -> bool:
    return bool(machine.state(spans, list(chain.from_iterable(turns)))["busy"])


def _known(processes: Sequence[ModelProcess], turns: Sequence[Sequence[Turn]]) -> bool:
    """Whether the speed-up of every model that runs on the source's device has a narrow interval."""
    same = [own for own, process in zip(turns, processes, strict=True) if process.device == processes[0].device]
    return all(compared(turns[0], own)["narrow"] for own in same)


def order_of(models: int, number: int) -> list[int]:
    """Who follows whom in a round: over the rounds each model follows each other one equally often.

    It is a Latin square balanced for carry-over (Williams 1949), read backwards every second time.
    """
    steps = [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(models)]
    row = [(number + step) % models for step in steps]
    return row[::-1] if number // models % 2 else row


def latency(process: ModelProcess, size: int, length: int, turns: Sequence[Turn]) -> dict[str, Any]:
    """What was timed of one model at one batch size, over all rounds."""
    seconds = [second for turn in turns for second in turn.seconds]
    return {
        "device": process.device,
        "runtime": {"onnx": "onnxruntime"}.get(process.artifact.runtime, process.artifact.runtime),
        "dtype": process.artifact.dtype,
        "threads": turns[0].threads,
        "batch_size": size,
        "sequence_length": length,
        "p50_ms": milliseconds(turns, 0.5),
        "p95_ms": milliseconds(turns, 0.95),
        "samples_per_s": round(size * len(seconds) / sum(seconds), 2),
        "rounds": len(turns),
    }


def milliseconds(turns: Sequence[Turn], quantile: float) -> float:
    """A quantile of the times of all batches of all turns, as the report gives it."""
    import numpy as np

    return round(float(np.quantile([second for turn in turns for second in turn.seconds], quantile)) * 1000, 4)


def compared(source: Sequence[Turn], own: Sequence[Turn]) -> dict[str, Any]:
    """How many times faster than the source a model is, and how well that is known.

    Returns:
        `speedup`, the ratio of the medians of all batches; `speedup_interval`, the 95% interval of the median over
        rounds of the ratio of a round's medians, widened to hold `speedup` where it does not, None where the rounds are
        too few; and whether it is `narrow`.
    """
    speedup = milliseconds(source, 0.5) / milliseconds(own, 0.5)
    rounds = [milliseconds([a], 0.5) / milliseconds([b], 0.5) for a, b in zip(source, own, strict=True)]
    interval = median_interval(rounds)
    if interval is None:
        return {"speedup": round(speedup, 4), "speedup_interval": None, "narrow": False}
    low, high = min(interval[0], speedup), max(interval[1], speedup)
    return {
        "speedup": round(speedup, 4),
        "speedup_interval": [round(low, 4), round(high, 4)],
        "narrow": (high - low) / 2 <= NARROW * speedup,
    }


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The interval of a median by order statistics, whatever the values' distribution (David & Nagaraja 2003, 7.1).

    Of n values in order it is `x[k]` to `x[n + 1 - k]`, with the largest k for which `2 P(B < k) <= 1 - confidence`, B
    binomial of n throws of a coin: the median lies below `x[k]` only where fewer than k values fall below the median.

    Returns:
        Its ends; None where the values are too few: for 95%, fewer than 6.
    """
    number, ordered = len(values), sorted(values)
    tail, k = 0.0, 0
    while k < number:
        tail += math.comb(number, k) / 2**number
        if 2 * tail > 1 - confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[number - k]) if k else None


LEAST_ROUNDS = next(n for n in count(1) if median_interval([0.0] * n))
"""Rounds from which an interval can be told."""
