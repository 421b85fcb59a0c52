"""Times models: they take turns until each speed-up is known well enough, or for at most 20 rounds.

Each model has a process of its own. Because of the turns, other work of the machine affects all models, but not all
equally: an operator of PyTorch waits for its slowest thread, so other work slows some runtimes more than others.
`machine` looks for other work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
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
"""Largest batch size: far above what any application needs."""
MAX_ROUNDS = 20
"""Largest number of rounds; an interval that is still wide then is reported as it is."""
NARROW = 0.05
"""A speed-up is known well enough if half the width of its interval is at most this share of it."""
CONFIDENCE = 0.95
TRIALS, TRIAL_BATCHES = 3, 8
"""Number of trials of each thread count, and batches of each trial."""


class Latency(StrictModel):
    """Options of measuring speed."""

    device: Literal["cpu", "cuda"] = "cpu"
    batch_sizes: list[Annotated[int, Field(ge=1, le=MAX_BATCH)]] = Field(default=[1, 32], min_length=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of one operator. By default each PyTorch model runs, at each batch size, on the count at which it is
    fastest, of 1, 2, 4, … and the most that `OMP_NUM_THREADS`, CPU affinity and a container's CPU quota allow; graphs
    run on the most."""
    rounds: int = Field(default=6, ge=1)
    """Least number of rounds in which the models take turns, never fewer than 6. More rounds follow until each
    speed-up's 95% interval is within 5% of it, at most 20."""
    rows: int = Field(default=256, ge=1)
    """Rows of the judged split in a round, in at most 64 batches, each padded to its longest row."""
    lengths: list[Annotated[int, Field(ge=4)]] = []
    """Also time each batch size with rows of exactly these lengths, in tokens: a grid of batch x length. The rows are
    made from the judged ones, by cutting or joining them."""
    cold_starts: int = Field(default=3, ge=0, le=20)
    """How many times each model is started in a fresh process, to time that until its first answer; 0 leaves it out."""
    sustained: bool = False
    """Also measure rows/s over 3 s at the largest batch size, on 1, 2, 4, … threads and the most permitted."""


@dataclass(frozen=True)
class Cell:
    """A batch size and a length: one cell of the grid.

    Attributes:
        batch_size: Rows of a batch.
        length: The exact length of all rows, in tokens; None for the judged rows as they are.
    """

    batch_size: int
    length: int | None = None

    def __str__(self) -> str:
        return f"batch {self.batch_size}" + (f" of {self.length} tokens" if self.length else "")


class Rows(Protocol):
    """The judged rows, encoded with one model's tokenizer."""

    encoded: Sized

    def exact_batches(self, groups: Iterable[Sequence[int]], length: int) -> Iterator[Batch]:
        """Makes a batch of arrays from each group of rows, with rows of an exact length."""

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Makes a batch of arrays from each group of rows."""


def time_models(
    processes: Sequence[ModelProcess],
    rows: Sequence[Rows],
    options: Latency,
    seed: int,
    progress: Callable[[str], None],
    plain: int = 0,
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Times all models at each batch size, and then in each cell of the grid of batch sizes and lengths.

    Args:
        processes: The models, the source first.
        rows: The rows as each model reads them.
        options: Batch sizes, threads and so on.
        seed: Seed of the choice of rows.
        progress: Called with a line about each round.
        plain: How many of the last models are the source in plain runtimes. The entries of graphs then also have
            `speedup_plain`, how many times faster they are than the fastest of these, and `plain`, its name.

    Returns:
        For each model a list with an entry for each cell of `list_cells`, as in the report; and the machine's state.
    """
    import numpy as np

    found: list[list[dict[str, Any]]] = [[] for _ in processes]
    watched: list[tuple[list[Span], list[Turn]]] = []
    order = np.random.default_rng(seed).permutation(min(len(each.encoded) for each in rows))
    for cell in list_cells(options):
        groups = draw_groups(order, cell.batch_size, options.rows)
        lengths = [prepare(process, each, groups, cell) for process, each in zip(processes, rows, strict=True)]
        threads = [options.threads or fastest_threads(process) for process in processes]
        turns, spans = _run_rounds(processes, threads, options.rounds, partial(_tell, progress, cell))
        watched.append((spans, list(chain.from_iterable(turns))))
        models = len(processes) - plain
        fastest = min(range(models, len(processes)), key=lambda n: milliseconds(turns[n], 0.5), default=None)
        for n, (entries, process, length, own) in enumerate(zip(found, processes, lengths, turns, strict=True)):
            same_device = process.device == processes[0].device
            speed = (
                compare_speed(turns[0], own)
                if same_device
                else dict.fromkeys(("speedup", "speedup_interval", "narrow"))
            )
            entry = {**summarize_turns(process, cell.batch_size, length, own), **speed}
            if fastest is not None and n < models and process.artifact.runtime != "torch":
                beside = compare_speed(turns[fastest], own)
                entry |= {"speedup_plain": beside["speedup"], "speedup_plain_interval": beside["speedup_interval"]}
                entry["plain"] = processes[fastest].artifact.stage
            entries.append(entry)
    return found, machine.judge_all(watched)


def list_cells(options: Latency) -> list[Cell]:
    """Lists what is timed: the judged rows as they are at each batch size, then each batch size with each length."""
    sizes = options.batch_sizes
    return [*map(Cell, sizes), *(Cell(size, length) for size in sizes for length in options.lengths)]


def _tell(progress: Callable[[str], None], cell: Cell, number: int) -> None:
    progress(f"latency, {cell}: round {number}")


def draw_groups(order: np.ndarray[Any, Any], size: int, rows: int) -> list[list[int]]:
    """Chooses the rows of each batch."""
    number = min(max(min(rows, len(order)) // size, 1), MAX_BATCHES)
    return [[int(order[i % len(order)]) for i in range(b * size, (b + 1) * size)] for b in range(number)]


def prepare(process: ModelProcess, rows: Rows, groups: list[list[int]], cell: Cell) -> int:
    """Sends a model its batches and returns their mean length."""
    import numpy as np

    batches = list(rows.exact_batches(groups, cell.length) if cell.length else rows.batches(groups))
    process.prepare(batches)
    return round(float(np.mean([batch["input_ids"].shape[1] for batch in batches])))


def fastest_threads(process: ModelProcess) -> int:
    """Finds the permitted thread count at which a model is fastest on its batches.

    On too many threads a small batch loses more by waiting than it gains, and every model that is compared with it
    would look fast.
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


def _run_rounds(
    processes: Sequence[ModelProcess], threads: Sequence[int], least: int, tell: Callable[[int], None]
) -> tuple[list[list[Turn]], list[Span]]:
    """Lets the models take turns until each speed-up is known well enough, or the machine turns out to be busy.

    Returns:
        The turns of each model, and the processors' counters for that time; empty if no model ran on a processor.
    """
    turns: list[list[Turn]] = [[] for _ in processes]
    on_processor = any(process.device == "cpu" for process in processes)
    pids = [process.pid for process in processes]
    least, before, spans = max(least, LEAST_ROUNDS), machine.read_counters(pids), []
    for number in range(max(least, MAX_ROUNDS)):
        tell(number + 1)
        for index in make_order(len(processes), number):
            turns[index].append(processes[index].time(threads[index]))
        spans = [machine.read_counters(pids).since(before)] if on_processor else []
        if number + 1 >= least and (_are_narrow(processes, turns) or _is_busy(spans, turns)):
            break
    return turns, spans


def _is_busy(spans: Sequence[Span], turns: Sequence[Sequence[Turn]]) -> bool:
    return bool(machine.state(spans, list(chain.from_iterable(turns)))["busy"])


def _are_narrow(processes: Sequence[ModelProcess], turns: Sequence[Sequence[Turn]]) -> bool:
    """True if the speed-up of every model on the source's device has a narrow interval."""
    same = [own for own, process in zip(turns, processes, strict=True) if process.device == processes[0].device]
    return all(compare_speed(turns[0], own)["narrow"] for own in same)


def make_order(models: int, number: int) -> list[int]:
    """Orders the models of a round such that over the rounds each model follows each other one equally often.

    The rounds are the rows of a Latin square balanced for carry-over (Williams 1949), every second time read backwards.
    """
    steps = [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(models)]
    row = [(number + step) % models for step in steps]
    return row[::-1] if number // models % 2 else row


def summarize_turns(process: ModelProcess, size: int, length: int, turns: Sequence[Turn]) -> dict[str, Any]:
    """Summarizes the turns of one model at one batch size for the report."""
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
        "p99_ms": milliseconds(turns, 0.99),
        "samples_per_s": round(size * len(seconds) / sum(seconds), 2),
        "rounds": len(turns),
    }


def milliseconds(turns: Sequence[Turn], quantile: float) -> float:
    """Computes a quantile of the times of all batches of all turns, in milliseconds."""
    import numpy as np

    return round(float(np.quantile([second for turn in turns for second in turn.seconds], quantile)) * 1000, 4)


def compare_speed(source: Sequence[Turn], own: Sequence[Turn]) -> dict[str, Any]:
    """Computes the speed-up of a model over the source, with its interval.

    Returns:
        `speedup`, the ratio of the medians of all batches. `speedup_interval`: each round gives a ratio of its medians,
        and this is the 95% interval of the median of these ratios, widened if needed to contain `speedup`; None if
        there are too few rounds. `narrow`, True if the interval is narrow enough.
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
    """Computes the interval of a median by order statistics, for any distribution (David & Nagaraja 2003, 7.1).

    For n sorted values the interval is `x[k]` to `x[n + 1 - k]`, with the largest k for which
    `2 P(B < k) <= 1 - confidence`, where B is binomial (n throws of a coin): the median is below `x[k]` only if fewer
    than k values are below the median.

    Returns:
        Its ends; None if there are too few values (for 95%, fewer than 6).
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
"""Fewest rounds that give an interval."""
