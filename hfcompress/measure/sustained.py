"""Measures how many rows a second a model answers without a pause, on each permitted number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hfcompress.measure.process import ModelProcess
from hfcompress.measure.timing import Cell, Latency, Rows, draw_groups, make_order, prepare
from hfcompress.utils.processors import thread_counts

TURNS, SECONDS = 3, 1.0
"""Number of turns of each model on each number of threads, and seconds of a turn."""


def measure_sustained(
    processes: Sequence[ModelProcess],
    rows: Sequence[Rows],
    options: Latency,
    seed: int,
    progress: Callable[[str], None],
) -> list[list[dict[str, Any]]]:
    """Measures the sustained throughput of each model at the largest batch size; the models take turns.

    A graph is loaded again for each number of threads. A model on a GPU runs once: its threads do not matter.

    Returns:
        For each model a list with `threads`, `batch_size` and `samples_per_s` of each number of threads, ascending.
    """
    import numpy as np

    cell, found = Cell(max(options.batch_sizes)), [list[dict[str, Any]]() for _ in processes]
    order = np.random.default_rng(seed).permutation(min(len(each.encoded) for each in rows))
    groups = draw_groups(order, cell.batch_size, options.rows)
    for process, each in zip(processes, rows, strict=True):
        prepare(process, each, groups, cell)
    most = max(process.threads for process in processes)
    counts = [options.threads] if options.threads else thread_counts(most)
    for threads in counts:
        progress(f"sustained throughput, batch {cell.batch_size}, threads {threads} of {counts[-1]}")
        running = [n for n, process in enumerate(processes) if process.device == "cpu" or threads == counts[-1]]
        for n in running:
            processes[n].use_threads(threads)
        totals = {n: np.zeros(2) for n in running}
        for turn in range(TURNS):
            for place in make_order(len(running), turn):
                totals[running[place]] += processes[running[place]].sustain(SECONDS)
        for n, (number, seconds) in totals.items():
            speed = round(float(number / seconds), 2)
            found[n].append({"threads": threads, "batch_size": cell.batch_size, "samples_per_s": speed})
    return found
