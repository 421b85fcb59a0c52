"""The source in ONNX Runtime, unchanged: it tells how much of a graph's speed-up is due to the runtime alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfcompress.models.artifact import Artifact, load_tokenizer, open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.export import load_and_export
from hfcompress.onnx.graph_io import write_model_directory
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from hfcompress.data.task import Task

NAME = "source in ONNX Runtime"
GRAPHS = ("onnx", "openvino")
"""Runtimes whose models gain speed by the runtime alone."""


@contextmanager
def export_source(artifacts: Sequence[Artifact], task: Task, device: str) -> Iterator[Artifact | None]:
    """Exports the source as a float32 graph that exists within this context.

    Args:
        artifacts: The models of a report, the source first.
        task: The task that they answer.
        device: The device that they are timed on.

    Returns:
        The graph; None if no other model is a graph, if the source is no float model of PyTorch, if they are timed on a
        GPU, or if the source cannot be exported.
    """
    source, *others = artifacts
    if device != "cpu" or not source.trainable or not any(other.runtime in GRAPHS for other in others):
        yield None
        return
    with scratch_directory() as folder:
        try:
            inputs = make_dummy_inputs(source.path)
            model, graph = load_and_export(source.path, task.auto_class, inputs)
            write_model_directory(graph, model.config, folder, inputs, "float32")
        except (HfcompressError, ImportError) as error:
            log.info(f"the source is not timed in ONNX Runtime: {str(error).partition(chr(10))[0]}")
            yield None
            return
        load_tokenizer(source.path, task).save_pretrained(folder)
        yield open_artifact(folder, NAME, "source")


def describe(latency: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describes it for the report."""
    return {"runtime": "onnxruntime", "dtype": "float32", "latency": list(latency)}
