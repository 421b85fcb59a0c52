"""Times how long a model takes from the start of a process to its first answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hfcompress.measure.process import Batch, ModelProcess
from hfcompress.measure.timing import make_order


def time_cold_starts(
    processes: Sequence[ModelProcess], batches: Sequence[Batch], starts: int, progress: Callable[[str], None]
) -> list[dict[str, Any] | None]:
    """Starts each model several times in a fresh process; the models take turns.

    The files of the models are in the memory of the system, because each model was loaded before.

    Args:
        processes: The models.
        batches: For each model the batch of one row that it answers first.
        starts: The number of starts of each model.
        progress: Called with a line about each turn.

    Returns:
        For each model the medians of `ModelProcess.start_again`, and `starts`; None if `starts` is 0.
    """
    import numpy as np

    found: list[list[dict[str, float]]] = [[] for _ in processes]
    for number in range(starts):
        progress(f"cold start {number + 1} of {starts}")
        for index in make_order(len(processes), number):
            found[index].append(processes[index].start_again(batches[index]))
    return [
        {key: round(float(np.median([each[key] for each in own])), 4) for key in own[0]} | {"starts": starts}
        if own
        else None
        for own in found
    ]
