"""Converts ONNX graphs to OpenVINO, quantizes them with nncf, and writes model directories."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from hfcompress.onnx.export import load_and_export, quiet
from hfcompress.onnx.fuse import paths_of
from hfcompress.onnx.graph_io import is_large, require_same_logits, save_graph, write_config
from hfcompress.quantization.graphs.int8 import find_linear_nodes
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.processors import default_threads

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from hfcompress.models.dummy_inputs import DummyInputs
    from hfcompress.quantization.backends.base import QuantizationJob

FILE = "openvino_model.xml"
"""The name of the graph; its tensors are in the `.bin` beside it."""


def load_and_convert(job: QuantizationJob) -> tuple[PreTrainedModel, onnx.ModelProto, Any]:
    """Loads a model directory and converts it to OpenVINO.

    Returns:
        The float model, its ONNX graph and its `openvino.Model`, which give the same logits on the dummy inputs.

    Raises:
        HfcompressError: if the logits of a graph differ, or weights are not finite.
    """
    model, graph = load_and_export(job.source, job.auto_class, job.dummy_inputs)
    converted = convert(graph)
    require_same_logits(run_openvino(converted, job.dummy_inputs), model, job.dummy_inputs)
    return model, graph, converted


def convert(graph: onnx.ModelProto) -> Any:
    """Converts an ONNX graph to an `openvino.Model`.

    Raises:
        HfcompressError: for an operator that OpenVINO does not know.
    """
    import onnx
    import openvino

    large = is_large(graph)
    with scratch_directory() as folder, _quiet():
        save_graph(graph, folder / "model.onnx")
        try:
            return openvino.convert_model(folder / "model.onnx")
        except RuntimeError as error:
            why = str(error).strip().splitlines()
            raise HfcompressError(f"OpenVINO cannot convert the ONNX graph: {why[-1]}", "use onnx_int8") from error
        finally:
            if large:  # saving has moved its tensors into a file
                onnx.load_external_data_for_model(graph, str(folder))


def quantize(model: Any, rows: Sequence[dict[str, Any]], preset: str, ignored: Collection[str]) -> Any:
    """Quantizes weights and inputs of products by `nncf.quantize`; it also corrects biases and smooths outliers.

    Args:
        model: An `openvino.Model`.
        rows: The inputs of each calibration row.
        preset: `mixed` or `performance`.
        ignored: The names of nodes that stay float.
    """
    with _quiet():
        import nncf

        return nncf.quantize(
            model,
            nncf.Dataset(rows),
            preset=nncf.QuantizationPreset(preset),
            subset_size=len(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=sorted(ignored)),
        )


def compress_weights(model: Any, ignored: Collection[str], **options: Any) -> Any:
    """Quantizes the weights of products and the embedding tables by `nncf.compress_weights`.

    Args:
        model: An `openvino.Model`.
        ignored: The names of nodes that stay float.
        options: Others of its arguments; by default 8 bits.
    """
    with _quiet():
        import nncf

        return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=sorted(ignored)), **options)


def find_kept_nodes(graph: onnx.ModelProto, keep: Collection[str]) -> set[str]:
    """Finds the names of the nodes that compute the linear layers of `keep`; they are the same after `convert`."""
    return {node.name for node in graph.graph.node if paths_of(node)} - {x.name for x in find_linear_nodes(graph, keep)}


def write_openvino_directory(model: Any, config: Any, job: QuantizationJob, half: bool = False) -> NDArray[Any]:
    """Writes an `openvino.Model` and the model's config into the job's target.

    Args:
        model: The `openvino.Model`.
        config: The config of the float model.
        job: The job.
        half: Store float weights in float16.

    Returns:
        The logits of the written graph on the dummy inputs, computed in float32.
    """
    import openvino

    openvino.save_model(model, job.target / FILE, compress_to_fp16=half)
    write_config(config, job.target)
    return run_openvino(job.target / FILE, job.dummy_inputs)


def run_openvino(model: Any, dummy_inputs: DummyInputs) -> NDArray[Any]:
    """Runs an `openvino.Model`, or its file, in float32, and returns its logits; missing token types are zeros."""
    import numpy as np
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # by default it computes in bfloat16 where the processor can
        "INFERENCE_NUM_THREADS": default_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    known = {"token_type_ids": np.zeros_like(dummy_inputs["input_ids"]), **dummy_inputs}
    return np.array(compiled({node.get_any_name(): known[node.get_any_name()] for node in compiled.inputs})["logits"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences OpenVINO and nncf, and keeps them from sending usage data, while the context lasts.

    Both send such data to Intel unless these variables say that they run in a CI.
    """
    with patch.dict(os.environ, {"CI": "true", "NNCF_CI": "1"}), redirect_stdout(StringIO()), quiet():
        yield
