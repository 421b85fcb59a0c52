"""Writes ONNX graphs into model directories, runs them, and compares their logits with the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import PRUNED
from hfcompress.models.dummy_inputs import DummyInputs, logits_of
from hfcompress.models.weights import GRAPH_FILES, tensors_of
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.processors import default_threads

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

LIMIT = (1 << 31) - (1 << 24)
"""The largest size of the tensors in a graph's own file: protobuf writes less than 2 GB, nodes included."""
EXPORT_TOLERANCE = 1e-4
"""The largest difference of a logit that an export may cause, relative to the largest logit or 1."""
JAVASCRIPT_TYPES = {"float32": "fp32", "float16": "fp16", "int8": "q8", "int4": "q4"}
"""The names of types in Transformers.js, by the type of a graph's weights; each belongs to a file of `GRAPH_FILES`."""


def is_large(graph: onnx.ModelProto) -> bool:
    """True if the tensors of a graph in memory need a file of their own."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in tensors_of(graph.graph)) > LIMIT


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Writes a graph; the tensors of a large one go into `NAME_data` beside it, as in Optimum.

    A large graph in memory cannot be used afterwards: its tensors are then only in the file.
    """
    import onnx

    if not is_large(graph):
        onnx.save(graph, path)
        return
    beside = _data_file(path)
    beside.unlink(missing_ok=True)  # onnx appends to an existing file
    onnx.save(
        graph,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=beside.name,
        size_threshold=1024,
        convert_attribute=False,
    )


def write_model_directory(
    graph: onnx.ModelProto, config: Any, target: Path, dummy_inputs: DummyInputs, dtype: str
) -> NDArray[Any]:
    """Writes a graph and the model's config into a directory; see `save_graph` for large graphs.

    Args:
        graph: The graph.
        config: The model's config.
        target: The directory.
        dummy_inputs: A padded batch.
        dtype: The type of the weights: a key of `GRAPH_FILES`, which names the file.

    Returns:
        The logits of the written graph on the dummy inputs.
    """
    path = target / GRAPH_FILES[dtype]
    path.parent.mkdir(exist_ok=True)
    save_graph(graph, path)
    write_graph_config(config, target, dtype)
    return run_onnx(path, dummy_inputs)


def write_graph_config(config: Any, target: Path, dtype: str) -> None:
    """Writes config.json beside the graph of `GRAPH_FILES[dtype]`, with the file that Transformers.js loads."""
    javascript: dict[str, Any] = {"dtype": JAVASCRIPT_TYPES[dtype]}
    if _data_file(target / GRAPH_FILES[dtype]).is_file():
        javascript["use_external_data_format"] = True
    write_config(config, target, {"transformers.js_config": javascript})


def _data_file(path: Path) -> Path:
    """Returns the file for the tensors of a graph that is too large to contain them."""
    return path.with_name(f"{path.name}_data")


def write_config(config: Any, path: Path, more: Mapping[str, Any] | None = None) -> None:
    """Writes config.json with all label names and the names of the stock architecture and class.

    transformers would leave default label names out. A graph needs no modeling code, even that of a pruned model, so
    the config must not name any; clients choose their own code by the stock names.

    Args:
        config: The model's config.
        path: The directory.
        more: Keys to add.
    """
    config.save_pretrained(path)
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    content.pop("auto_map", None)
    content |= {"id2label": config.id2label, "model_type": str(config.model_type).removeprefix(PRUNED)}
    content["architectures"] = [name.removeprefix("Pruned") for name in content.get("architectures") or []]
    content |= more or {}
    (path / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def run_onnx(path: Path, dummy_inputs: DummyInputs) -> NDArray[Any]:
    """Runs an exported graph on dummy inputs, and returns its logits; missing token types are zeros."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()  # its default ignores CPU affinity and a container's quota
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"token_type_ids": np.zeros_like(dummy_inputs["input_ids"])}
    feed = {node.name: {**types, **dummy_inputs}[node.name] for node in session.get_inputs()}
    return session.run(["logits"], feed)[0]


def require_same_logits(found: NDArray[Any], model: PreTrainedModel, dummy_inputs: DummyInputs) -> None:
    """Checks that a float graph's logits on the dummy inputs are the model's; padding tokens are not compared.

    Raises:
        HfcompressError: if they differ by more than `EXPORT_TOLERANCE`.
    """
    import numpy as np

    expected = logits_of(model, dummy_inputs)
    differences = np.abs(found - expected) / max(1.0, float(np.abs(expected).max()))
    difference = float(
        (differences if differences.ndim == 2 else differences[dummy_inputs["attention_mask"] == 1]).max()
    )
    if not difference <= EXPORT_TOLERANCE:
        raise HfcompressError(f"the exported graph differs from the model by {difference:.2g} before any quantization")


def strip_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Copies a graph, with inputs of the same type and shape in place of its large tensors.

    Shape inference refuses a graph of 2 GB or more, but accepts this copy.
    """
    import onnx
    from onnx import helper

    copy = onnx.ModelProto(ir_version=graph.ir_version)
    copy.opset_import.extend(graph.opset_import)
    copy.graph.name = graph.graph.name
    copy.graph.node.extend(graph.graph.node)
    copy.graph.input.extend(graph.graph.input)
    copy.graph.output.extend(graph.graph.output)
    copy.graph.value_info.extend(graph.graph.value_info)
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) > 1024:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            copy.graph.initializer.append(tensor)
    return copy
