"""The source in plain runtimes, unchanged: they tell how much of a graph's speed-up is due to the runtime alone.

They are ONNX Runtime in float32, and PyTorch in bfloat16 if the processor multiplies that type natively.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.measure.hardware import Abilities, abilities
from hfcompress.models.artifact import Artifact, load_tokenizer, open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.export import load_and_export
from hfcompress.onnx.graph_io import write_model_directory
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from hfcompress.data.task import Task

NAME, BFLOAT16 = "source in ONNX Runtime", "source in bfloat16"
NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Flags of processors that multiply bfloat16; others convert each number, and are slower with it than in float32."""
GRAPHS = ("onnx", "openvino")
"""Runtimes whose models gain speed by the runtime alone."""


@dataclass(frozen=True)
class PlainRuntime:
    """The source in another runtime or number type.

    Attributes:
        artifact: The source, under the name that the report shows.
        dtype: The type to compute in; None for that of the artifact.
    """

    artifact: Artifact
    dtype: str | None = None


@contextmanager
def open_plain_runtimes(
    artifacts: Sequence[Artifact], task: Task, device: str, able: Abilities | None = None
) -> Iterator[list[PlainRuntime]]:
    """Prepares the source for the plain runtimes of this machine; they exist within this context.

    Args:
        artifacts: The models of a report, the source first.
        task: The task that they answer.
        device: The device that they are timed on.
        able: What the machine can do; by default this machine.

    Returns:
        The plain runtimes; none if no other model is a graph, if the source is no float model of PyTorch, or if they
        are timed on a GPU.
    """
    source, *others = artifacts
    if device != "cpu" or not source.trainable or not any(other.runtime in GRAPHS for other in others):
        yield []
        return
    found = []
    if (able or abilities()).has(*NATIVE_BFLOAT16):
        found.append(PlainRuntime(replace(source, stage=BFLOAT16), "bfloat16"))
    with _export_source(source, task) as graph:
        yield [*([PlainRuntime(graph)] if graph else []), *found]


@contextmanager
def _export_source(source: Artifact, task: Task) -> Iterator[Artifact | None]:
    """Exports the source as a float32 graph that exists within this context; None if it cannot be exported."""
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


def describe(plain: PlainRuntime, latency: Sequence[dict[str, Any]], grid: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describes one for the report."""
    return {
        "name": plain.artifact.stage,
        "runtime": "torch" if plain.artifact.runtime == "torch" else "onnxruntime",
        "dtype": plain.dtype or plain.artifact.dtype,
        "latency": list(latency),
        "latency_grid": list(grid),
    }
