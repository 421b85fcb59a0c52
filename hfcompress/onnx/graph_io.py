"""Graphs as files: one, or one and another with its tensors where protobuf's 2 GB are not enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.models.weights import tensors_of

if TYPE_CHECKING:
    import onnx

LIMIT = (1 << 31) - (1 << 24)
"""Bytes of tensors that a graph's own file takes: protobuf writes less than 2 GB, nodes and names included."""


def is_large(graph: onnx.ModelProto) -> bool:
    """Whether the tensors of a graph in memory need a file of their own."""
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in tensors_of(graph.graph)) > LIMIT


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Writes a graph; a large one keeps its tensors in `NAME_data` beside it, where Optimum keeps them too.

    A large graph is of no use in memory afterwards: its tensors are gone to the file.
    """
    import onnx

    if not is_large(graph):
        onnx.save(graph, path)
        return
    beside = path.with_name(f"{path.name}_data")
    beside.unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save(
        graph,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=beside.name,
        size_threshold=1024,
        convert_attribute=False,
    )


def without_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of the same types and sizes, whose large tensors are inputs: what shape inference can take in whole."""
    import onnx
    from onnx import helper

    made = onnx.ModelProto(ir_version=graph.ir_version)
    made.opset_import.extend(graph.opset_import)
    made.graph.name = graph.graph.name
    made.graph.node.extend(graph.graph.node)
    made.graph.input.extend(graph.graph.input)
    made.graph.output.extend(graph.graph.output)
    made.graph.value_info.extend(graph.graph.value_info)
    for tensor in graph.graph.initializer:
        if len(tensor.raw_data) > 1024:
            made.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            made.graph.initializer.append(tensor)
    return made
