"""How models take turns, on how many threads, for how long, and what is told of the ratios."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hfcompress.measure import timing
from hfcompress.measure.machine import Turn
from hfcompress.measure.timing import (
    LEAST_ROUNDS,
    MAX_ROUNDS,
    Latency,
    compare_speed,
    fastest_threads,
    make_order,
    median_interval,
    summarize_turns,
    time_models,
)  # fmt: skip
from tests import factories


def turn(*seconds: float, threads: int = 1) -> Turn:
    return Turn(seconds, threads, sum(seconds), sum(seconds), 0.0, 0)


class Rows:
    """Twelve rows of five tokens."""

    encoded = range(12)

    def batches(self, groups: list[list[int]]) -> Iterator[dict[str, Any]]:
        return self.exact_batches(groups, 5)

    def exact_batches(self, groups: list[list[int]], length: int) -> Iterator[dict[str, Any]]:
        for group in groups:
            yield {"input_ids": np.zeros((len(group), length), "int64")}


class Process:
    """A model whose turns take what `clock` says of the thread count and the number of the turn."""

    def __init__(self, clock: Callable[[int, int], float], device: str = "cpu", graph: bool = False) -> None:
        self.clock, self.device, self.chooses_threads = clock, device, device == "cpu" and not graph
        self.artifact = SimpleNamespace(runtime="onnx" if graph else "torch", dtype="float32")
        self.threads, self.pid, self.told = 4, os.getpid(), []  # type: ignore[var-annotated]

    def prepare(self, batches: list[Any]) -> None:
        self.size, self.length = batches[0]["input_ids"].shape

    def time(self, threads: int, most: int | None = None) -> Turn:
        if most is None:
            self.told.append(threads)
        return turn(self.clock(threads, len(self.told)) * self.size, threads=threads)


def timed(*processes: Process, state: dict[str, Any] = factories.QUIET, **options: Any) -> list[list[dict[str, Any]]]:
    with factories.machine_state(state):
        found, told = time_models(processes, [Rows()] * len(processes), Latency(**options), 0, lambda _: None)  # type: ignore[arg-type]
    assert told == state
    return found


# The interval


def coverage(number: int, low: int, high: int) -> float:
    """How often `x[low]` to `x[high]`, counted from 1, of a symmetric distribution hold its median, by brute force."""
    held = [low <= bin(signs).count("1") < high for signs in range(2**number)]
    return sum(held) / len(held)


@pytest.mark.parametrize("number", range(6, 17))
def test_the_interval_of_a_median_holds_it_as_often_as_it_says_and_no_narrower_one_does(number: int) -> None:
    found = median_interval([float(k) for k in range(number, 0, -1)])
    assert found is not None
    low, high = (int(end) for end in found)
    assert low + high == number + 1
    assert coverage(number, low, high) >= 0.95
    assert coverage(number, low + 1, high - 1) < 0.95


def test_five_rounds_tell_no_interval() -> None:
    assert median_interval([1.0] * 5) is None
    assert LEAST_ROUNDS == 6


def test_a_ratio_is_of_the_medians_and_its_interval_of_the_rounds() -> None:
    source = [turn(4.0, 8.0, 6.0) for _ in range(9)]
    own = [turn(seconds, 9.0, 0.5) for seconds in (2.0, 1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.5, 2.5)]
    # The rounds' ratios in order: 2, 2.4, 3 (5 times), 4, 6; of nine the second to the eighth.
    assert compare_speed(source, own) == {"speedup": 3.0, "speedup_interval": [2.4, 4.0], "narrow": False}
    assert compare_speed(source, source) == {"speedup": 1.0, "speedup_interval": [1.0, 1.0], "narrow": True}


def test_the_interval_holds_the_ratio() -> None:
    source = [turn(1.0, 1.0, 10.0)] * 4 + [turn(10.0, 10.0, 10.0)] * 2
    own = [turn(1.0, 1.0, 1.0)] * 6
    found = compare_speed(source, own)
    low, high = found["speedup_interval"]
    assert low <= found["speedup"] <= high


def test_a_latency_entry_is_the_quantiles_of_what_was_timed() -> None:
    process: Any = Process(lambda *_: 1.0, graph=True)
    found = summarize_turns(process, 8, 17, [turn(0.010, 0.020, 0.030, threads=3), turn(0.040, 0.100, threads=3)])
    assert found == {
        "device": "cpu",
        "runtime": "onnxruntime",
        "dtype": "float32",
        "threads": 3,
        "batch_size": 8,
        "sequence_length": 17,
        "p50_ms": 30.0,
        "p95_ms": 88.0,  # 0.8 of the way from the fourth to the fifth
        "p99_ms": 97.6,
        "samples_per_s": 200.0,  # 40 rows in 0.2 s
        "rounds": 2,
    }


# Turns


@pytest.mark.parametrize("models", [2, 3, 4, 5])
def test_over_the_rounds_each_model_follows_each_other_one_equally_often(models: int) -> None:
    rounds = [make_order(models, number) for number in range(2 * models)]
    assert all(sorted(order) == list(range(models)) for order in rounds)
    followed = [pair for order in rounds for pair in pairwise(order)]
    counts = {(a, b): followed.count((a, b)) for a in range(models) for b in range(models) if a != b}
    assert len(set(counts.values())) == 1
    assert all(len({order.index(model) for order in rounds}) > 1 for model in range(models))


def test_it_goes_on_until_the_ratio_is_known() -> None:
    wild = {1: 3.0, 2: 2.0}
    source, own = Process(lambda _, number: wild.get(number, 1.0)), Process(lambda *_: 0.5)
    _, (entry,) = timed(source, own, batch_sizes=[1], threads=1)
    # Two rounds are off; from the twelfth on, the two smallest and the two largest of the rounds may be.
    assert (entry["rounds"], entry["speedup_interval"], entry["narrow"]) == (12, [2.0, 2.0], True)
    assert len(source.told) == len(own.told) == 12


def test_what_is_never_known_is_told_so() -> None:
    draw = np.random.default_rng(0)
    _, (entry,) = timed(Process(lambda *_: 1.0), Process(lambda *_: draw.uniform(0.2, 2)), batch_sizes=[1], threads=1)
    assert entry["rounds"] == MAX_ROUNDS
    assert entry["narrow"] is False
    low, high = entry["speedup_interval"]
    assert low < entry["speedup"] < high


@pytest.mark.parametrize(("asked", "made"), [(1, 6), (6, 6), (9, 9), (25, 25)])
def test_rounds_is_the_least_number(asked: int, made: int) -> None:
    (entry,), _ = timed(Process(lambda *_: 1.0), Process(lambda *_: 0.5), batch_sizes=[1], threads=1, rounds=asked)
    assert entry["rounds"] == made


def test_on_a_busy_machine_more_rounds_are_not_waited_for() -> None:
    draw = np.random.default_rng(0)
    models = Process(lambda *_: 1.0), Process(lambda *_: draw.uniform(0.2, 2))
    _, (entry,) = timed(*models, state=factories.BUSY, batch_sizes=[1], threads=1)
    assert (entry["rounds"], entry["narrow"]) == (LEAST_ROUNDS, False)


def test_there_is_no_speedup_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    source, graph, small = Process(lambda *_: 1.0, "cuda"), Process(lambda *_: 9.0, graph=True), Process(
        lambda *_: 0.5, "cuda"
    )  # fmt: skip
    (own,), (other,), (same,) = timed(source, graph, small, batch_sizes=[1])
    assert (own["speedup"], same["speedup"]) == (1.0, 2.0)
    assert (other["speedup"], other["speedup_interval"], other["narrow"]) == (None, None, None)


def test_each_batch_size_is_also_timed_with_rows_of_each_length() -> None:
    source, own = Process(lambda *_: 1.0), Process(lambda *_: 0.5)
    source.clock = lambda *_: source.length
    found = timed(source, own, batch_sizes=[1, 2], lengths=[8, 4], threads=1)
    cells = [(1, 5), (2, 5), (1, 8), (1, 4), (2, 8), (2, 4)]
    assert [[(e["batch_size"], e["sequence_length"]) for e in entries] for entries in found] == [cells, cells]
    assert [entry["speedup"] for entry in found[1]] == [10.0, 10.0, 16.0, 8.0, 16.0, 8.0]
    assert {entry["rounds"] for entry in found[1]} == {LEAST_ROUNDS}
    assert all(entry["narrow"] for entry in found[1])


# Threads


def test_each_pytorch_model_runs_on_the_threads_that_it_is_fastest_on_at_each_batch_size() -> None:
    many, few = Process(lambda threads, _: 1 / threads), Process(lambda threads, _: abs(threads - 2) + 1)
    graph = Process(lambda *_: 1.0, graph=True)
    found = timed(many, few, graph, batch_sizes=[1, 2])
    assert [[entry["threads"] for entry in entries] for entries in found] == [[4, 4], [2, 2], [4, 4]]
    assert {*many.told} == {4}
    assert {*few.told} == {2}

    by_batch = Process(lambda *_: 1.0)
    by_batch.clock = lambda threads, _: threads if by_batch.size == 1 else 1 / threads
    ((one, two),) = timed(by_batch, batch_sizes=[1, 2])
    assert (one["threads"], two["threads"]) == (1, 4)


def test_threads_that_are_asked_for_are_kept_to() -> None:
    process = Process(lambda threads, _: 1 / threads)
    ((entry,),) = timed(process, batch_sizes=[1], threads=3)
    assert entry["threads"] == 3
    assert {*process.told} == {3}


def test_one_slow_trial_does_not_decide() -> None:
    trials: dict[int, list[float]] = {1: [5.0, 5.0, 5.0], 2: [90.0, 3.0, 3.0], 4: [4.0, 4.0, 4.0]}
    process: Any = SimpleNamespace(
        chooses_threads=True, threads=4, time=lambda threads, most: turn(trials[threads].pop(0))
    )
    assert fastest_threads(process) == 2
    assert all(not left for left in trials.values())
    assert timing.TRIALS == 3
