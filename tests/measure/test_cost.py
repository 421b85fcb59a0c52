"""Cold starts, sustained throughput, memory, and how far int8 answers depend on the batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hfcompress.measure import sustained, worker
from hfcompress.measure.batch_sensitivity import measure_batch_sensitivity
from hfcompress.measure.cold_start import time_cold_starts
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.quality import QUALITY_BATCH, compute_outputs
from hfcompress.measure.rows import Rows
from hfcompress.measure.sustained import measure_sustained
from hfcompress.measure.timing import Latency
from hfcompress.models.artifact import label_ids, load_tokenizer, open_artifact, read_config
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.recipe.loader import load

AUTO = "AutoModelForSequenceClassification"


# Cold starts


def test_a_start_is_timed_from_a_fresh_process_to_its_first_answer(teacher: Path) -> None:
    with ModelProcess(open_artifact(teacher), AUTO, threads=1) as process:
        found = process.start_again(make_dummy_inputs(teacher))
        assert process.peak_memory()[0] > 0  # the first process still answers
    assert set(found) == {"seconds", "import_seconds", "load_seconds"}
    assert all(seconds > 0 for seconds in found.values())
    assert found["import_seconds"] + found["load_seconds"] < found["seconds"]


def test_cold_starts_take_turns_and_their_medians_are_told() -> None:
    order: list[str] = []

    class Model:
        def __init__(self, name: str, *seconds: float) -> None:
            self.name, self.seconds = name, list(seconds)

        def start_again(self, batch: Any) -> dict[str, float]:
            order.append(self.name)
            assert batch == self.name
            return {"seconds": self.seconds.pop(0), "import_seconds": 0.5, "load_seconds": 0.25}

    models: Any = [Model("a", 9.0, 1.0, 2.0), Model("b", 3.0, 3.0, 4.0)]
    found = time_cold_starts(models, ["a", "b"], 3, lambda _: None)  # type: ignore[list-item]
    parts = {"import_seconds": 0.5, "load_seconds": 0.25, "starts": 3}
    assert found == [{"seconds": 2.0} | parts, {"seconds": 3.0} | parts]
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert order != ["a"] * 3 + ["b"] * 3
    assert time_cold_starts(models, [], 0, lambda _: None) == [None, None]


# Sustained throughput


class _Steady:
    """A model that answers `speed * threads` rows a second."""

    artifact = SimpleNamespace(runtime="torch")

    def __init__(self, speed: float, device: str = "cpu") -> None:
        self.speed, self.device, self.threads, self.prepared = speed, device, 4, 0

    def prepare(self, batches: list[Any]) -> None:
        self.prepared = len(batches[0]["input_ids"])

    def use_threads(self, threads: int) -> None:
        self.threads = threads

    def sustain(self, seconds: float) -> tuple[int, float]:
        return int(self.speed * self.threads * seconds), seconds


class _Eight:
    encoded = range(8)

    def batches(self, groups: Iterable[Any]) -> list[dict[str, Any]]:
        return [{"input_ids": np.zeros((len(group), 4))} for group in groups]


def test_throughput_is_measured_on_each_number_of_threads_at_the_largest_batch() -> None:
    models: Any = [_Steady(10.0), _Steady(30.0), _Steady(500.0, "cuda")]
    options = Latency(batch_sizes=[1, 8, 2])
    found = measure_sustained(models, [_Eight()] * 3, options, 0, lambda _: None)  # type: ignore[list-item]
    assert [[(e["threads"], e["samples_per_s"]) for e in entries] for entries in found] == [
        [(1, 10.0), (2, 20.0), (4, 40.0)],
        [(1, 30.0), (2, 60.0), (4, 120.0)],
        [(4, 2000.0)],
    ]
    assert {entry["batch_size"] for entries in found for entry in entries} == {8}
    assert [model.prepared for model in models] == [8, 8, 8]
    fixed = measure_sustained(models, [_Eight()] * 3, Latency(threads=3), 0, lambda _: None)  # type: ignore[list-item]
    assert [[entry["threads"] for entry in entries] for entries in fixed] == [[3], [3], [3]]


def test_a_worker_counts_the_rows_that_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(0.0, 100.0, 0.5))
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    asked: list[int] = []
    held = worker.Worker()
    held.model = type("Model", (), {"__call__": lambda self, batch: None, "finish": lambda self: None,
                                    "use_threads": lambda self, threads: asked.append(threads)})()  # fmt: skip
    held.batches = [{"input_ids": np.zeros((4, 2))}, {"input_ids": np.zeros((4, 3))}]
    # The clock is read at the start, before each batch, and at the end: batches begin at 0.5, 1.0 and 1.5 s.
    assert held.sustain(threads=2, seconds=2.0) == {"rows": 12, "seconds": 2.5}
    assert asked == [2]


def test_a_graph_is_loaded_again_for_other_threads(teacher: Path, tmp_path: Path) -> None:
    from hfcompress.onnx.export import load_and_export
    from hfcompress.onnx.graph_io import write_model_directory

    inputs = make_dummy_inputs(teacher)
    model, graph = load_and_export(teacher, AUTO, inputs)
    write_model_directory(graph, model.config, tmp_path, inputs, "float32")
    with ModelProcess(open_artifact(tmp_path), AUTO, threads=1) as process:
        process.prepare([inputs])
        before = process.logits([inputs])
        loads = process.loaded["load_seconds"]
        process.use_threads(1)
        assert process.loaded["load_seconds"] == loads
        process.use_threads(2)
        assert process.loaded["load_seconds"] != loads
        rows, seconds = process.sustain(0.01)
        assert rows >= len(inputs["input_ids"])
        assert seconds >= 0.01
        assert np.abs(process.logits([inputs]) - before).max() < 1e-4


def test_a_turn_of_sustained_throughput_lasts_seconds() -> None:
    assert sustained.TURNS * sustained.SECONDS >= 3


# Memory


def test_the_memory_of_a_gpu_is_told_apart_from_that_of_the_process() -> None:
    asked: list[str] = []

    def peak(device: str) -> int:
        asked.append(device)
        return 123_000

    model = worker.TorchModel.__new__(worker.TorchModel)
    model.device, model.torch = "cuda:0", SimpleNamespace(cuda=SimpleNamespace(max_memory_allocated=peak))
    held = worker.Worker()
    held.model = model
    found = held.memory()
    assert found["device"] == 123_000
    assert asked == ["cuda:0"]
    assert found["process"] > 10e6
    model.device = "cpu"
    assert held.memory()["device"] is None
    held.model = worker.GraphModel()
    assert held.memory()["device"] is None


# Batch sensitivity


class _Drifting:
    """A classifier whose logits depend on how many rows share the batch: those of `flips` change sides alone."""

    def __init__(self, rows: Rows, flips: set[int], dtype: str = "int8") -> None:
        self.artifact = SimpleNamespace(dtype=dtype, path="a model")
        self.number = {tuple(ids): n for n, ids in enumerate(rows.encoded["input_ids"][:])}
        self.flips = flips

    def logits(self, batches: Iterable[Any]) -> Any:
        found = []
        for batch in batches:
            alone = len(batch["input_ids"]) == 1
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                moved = alone and self.number[tuple(ids[mask == 1].tolist())] in self.flips
                found.append([0.0, -0.5 if moved else 0.25])
        return np.array(found)


@pytest.fixture
def rows(recipe: Path, teacher: Path) -> Rows:
    task = load(recipe).recipe.task
    return Rows(task, load_tokenizer(teacher), task.read("test"), label_ids(read_config(teacher)))


def test_answers_that_change_with_the_batch_are_counted(rows: Rows) -> None:
    last = {tuple(ids): n for n, ids in enumerate(rows.encoded["input_ids"][:])}
    flips = {last[tuple(rows.encoded["input_ids"][n])] for n in (3, 10)}
    expected = sum(last[tuple(ids)] in flips for ids in rows.encoded["input_ids"][:])
    process: Any = _Drifting(rows, flips)
    outputs = compute_outputs(process, rows)
    assert measure_batch_sensitivity(process, rows, outputs, QUALITY_BATCH["sequence"]) == {
        "rows": 48, "answers_changed": expected, "largest_difference": 0.75,
    }  # fmt: skip
    steady: Any = _Drifting(rows, set())
    found = measure_batch_sensitivity(steady, rows, compute_outputs(steady, rows), 32)
    assert found == {"rows": 48, "answers_changed": 0, "largest_difference": 0.0}


def test_float_models_are_not_asked_again(rows: Rows) -> None:
    process: Any = SimpleNamespace(artifact=SimpleNamespace(dtype="float32"))
    assert measure_batch_sensitivity(process, rows, np.zeros((48, 2)), 32) is None
