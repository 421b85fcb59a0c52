"""The source in ONNX Runtime tells how much of a speed-up is the runtime's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hfcompress.data.sequence import TextClassification
from hfcompress.measure.plain_runtime import NAME, export_source
from hfcompress.measure.timing import Latency, time_models
from hfcompress.models.artifact import Artifact, open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.report.conditions import describe_conditions
from tests import factories


@pytest.fixture
def task(data: Path) -> TextClassification:
    return TextClassification(dataset=str(data), text=["sentence"], max_length=16)


def test_the_source_becomes_a_graph_with_its_answers(teacher: Path, task: TextClassification) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    source = open_artifact(teacher)
    graph = replace(source, runtime="onnx")
    with export_source([source, graph], task, "cpu") as plain:
        assert plain is not None
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
        with export_source(artifacts, task, device) as plain:
            assert plain is None


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


def test_each_model_is_also_compared_with_the_plain_runtime(teacher: Path) -> None:
    artifact = open_artifact(teacher)
    graph = replace(artifact, runtime="onnx")
    clocks = [_Clock(artifact, 0.008), _Clock(artifact, 0.004), _Clock(graph, 0.002), _Clock(graph, 0.004)]
    options = Latency(batch_sizes=[1], rounds=6)
    found, _ = time_models(clocks, [_Rows()] * 4, options, 0, lambda _: None, plain=True)  # type: ignore[arg-type, list-item]
    assert [entry["speedup"] for (entry,) in found] == [1.0, 2.0, 4.0, 2.0]
    assert [entry.get("speedup_plain") for (entry,) in found] == [None, None, 2.0, 1.0]


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
