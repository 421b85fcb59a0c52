"""The source in ONNX Runtime tells how much of a speed-up is the runtime's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hfcompress.data.sequence import TextClassification
from hfcompress.measure.hardware import Abilities
from hfcompress.measure.plain_runtime import BFLOAT16, NAME, open_plain_runtimes
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.timing import Latency, time_models
from hfcompress.models.artifact import Artifact, open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.report.conditions import describe_conditions
from tests import factories

OLD, NEW = Abilities("A processor", frozenset({"avx2"})), Abilities("A processor", frozenset({"avx512_bf16"}))


@pytest.fixture
def task(data: Path) -> TextClassification:
    return TextClassification(dataset=str(data), text=["sentence"], max_length=16)


def test_the_source_becomes_a_graph_with_its_answers(teacher: Path, task: TextClassification) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    source = open_artifact(teacher)
    graph = replace(source, runtime="onnx")
    with open_plain_runtimes([source, graph], task, "cpu", OLD) as (runtime,):
        plain = runtime.artifact
        assert (plain.stage, plain.runtime, plain.dtype) == (NAME, "onnx", "float32")
        inputs = make_dummy_inputs(teacher)
        found = run_onnx(plain.path / "onnx" / "model.onnx", inputs)
        folder = plain.path
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    with torch.inference_mode():
        expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4
    assert not folder.exists()


def test_models_of_pytorch_and_of_a_gpu_are_compared_with_pytorch(teacher: Path, task: TextClassification) -> None:
    source = open_artifact(teacher)
    graph: Artifact = replace(source, runtime="onnx")
    for artifacts, device in (([source, source], "cpu"), ([source, graph], "cuda"), ([graph, graph], "cpu")):
        with open_plain_runtimes(artifacts, task, device, NEW) as plain:
            assert plain == []


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_processor_that_multiplies_bfloat16_runs_the_source_in_it_too(
    teacher: Path, task: TextClassification, flag: str
) -> None:
    source = open_artifact(teacher)
    able = Abilities("A processor", frozenset({flag}))
    with open_plain_runtimes([source, replace(source, runtime="onnx")], task, "cpu", able) as (graph, cast):
        assert (graph.artifact.stage, graph.dtype) == (NAME, None)
        assert (cast.artifact.stage, cast.artifact.path, cast.dtype) == (BFLOAT16, teacher, "bfloat16")
    with ModelProcess(cast.artifact, task.auto_class, threads=1, dtype=cast.dtype) as process:
        assert process.dtype == "bfloat16"
        rounded = process.logits([make_dummy_inputs(teacher)])
    with ModelProcess(source, task.auto_class, threads=1) as process:
        exact = process.logits([make_dummy_inputs(teacher)])
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


class _Clock:
    """A model that takes the same time for each batch."""

    device, chooses_threads, threads, pid = "cuda", False, 1, 1

    def __init__(self, artifact: Artifact, seconds: float) -> None:
        self.artifact, self.seconds = artifact, seconds

    def prepare(self, batches: object) -> None:
        pass

    def time(self, threads: int, most: int | None = None) -> object:
        from hfcompress.measure.machine import Turn

        return Turn([self.seconds] * 3, threads, 0.0, 0.0, 0.0, 0)


class _Rows:
    encoded = range(8)

    def batches(self, groups: object) -> list[dict[str, np.ndarray]]:
        return [{"input_ids": np.zeros((1, 4))}]


def test_graphs_are_also_compared_with_the_fastest_plain_runtime(teacher: Path) -> None:
    artifact = open_artifact(teacher)
    graph, cast = replace(artifact, runtime="onnx", stage=NAME), replace(artifact, stage=BFLOAT16)
    clocks = [
        _Clock(artifact, 0.008), _Clock(artifact, 0.004), _Clock(graph, 0.002), _Clock(graph, 0.004),
        _Clock(cast, 0.003),
    ]  # fmt: skip
    options = Latency(batch_sizes=[1], rounds=6)
    found, _ = time_models(clocks, [_Rows()] * 5, options, 0, lambda _: None, plain=2)  # type: ignore[arg-type, list-item]
    assert [entry["speedup"] for (entry,) in found] == [1.0, 2.0, 4.0, 2.0, pytest.approx(8 / 3, abs=1e-3)]
    assert [entry.get("speedup_plain") for (entry,) in found] == [None, None, 1.5, None, None]
    assert [entry.get("plain") for (entry,) in found] == [None, None, BFLOAT16, None, None]


def test_the_conditions_tell_runtime_and_compression_apart() -> None:
    rows = [factories.report_row("source"), factories.report_row("01-quantize", speedup=4.0)]
    rows[1]["latency"][0]["speedup_plain"] = 2.5
    content = {
        "environment": {"cpu": "A processor", "cpu_flags": [], "cores": 2, "accelerator": None, "versions": {}},
        "task": {"split": "test", "max_length": 16},
        "rows": rows,
        "plain_runtime": {"latency": [{"batch_size": 1, "speedup": 1.6}]},
    }
    text = describe_conditions(content)
    assert "Without compression, the source in ONNX Runtime has a speed-up of 1.60x at batch 1." in text
    assert "Compared with that, 01-quantize has one of 2.50x at batch 1." in text
