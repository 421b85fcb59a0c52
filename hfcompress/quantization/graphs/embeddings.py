"""Quantizes the embedding tables of a graph; it then dequantizes gathered rows only, never a whole table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hfcompress.onnx.fuse import paths_of
from hfcompress.quantization.grids.blockwise import BLOCK
from hfcompress.quantization.grids.rowwise import quantize_rowwise
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

INT4_IR_VERSION = 10
"""The first version of ONNX's format with int4."""


def quantize_embeddings(graph: onnx.ModelProto, bits: Literal[8, 4]) -> None:
    """Stores the tables of words, positions and token types in int8, or that of words in int4, in place.

    At 8 bits the graph gathers rows and their scales and multiplies them, by standard operators. At 4 bits it gathers
    words by ONNX Runtime's `GatherBlockQuantized`; the other tables, which are small, have 8 bits. The codes are those
    of `grids.rowwise.quantize_rowwise`. If another node reads a table too, the floats stay for that node.

    Args:
        graph: A float graph.
        bits: Bits of a word's weights.

    Raises:
        HfcompressError: for a table with values that are not finite.
    """
    from onnx import helper

    for name, gathers in find_embedding_gathers(graph).items():
        width = 4 if bits == 4 and any(_of_words(graph, node) for node in gathers) else 8
        codes, scales = quantize_rowwise(_finite(graph, name), width)  # type: ignore[arg-type]
        _store(graph, name, codes, scales, width)
        for node in gathers:
            _replace(graph, node, _gather_int4(node, name) if width == 4 else _gather_int8(node, name))
        if not any(name in node.input for node in graph.graph.node):
            graph.graph.initializer.remove(next(t for t in graph.graph.initializer if t.name == name))
        if width == 4:
            graph.ir_version = max(graph.ir_version, INT4_IR_VERSION)
            if not any(opset.domain == "com.microsoft" for opset in graph.opset_import):
                graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def tie_embeddings(graph: onnx.ModelProto) -> None:
    """Stores the word embeddings once if a mask head multiplies with the same table, transposed; in place.

    ONNX Runtime transposes the table when it loads the graph.

    Args:
        graph: A float graph, see `fuse.linears`. It no longer finds a linear layer whose weights are a table.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    tables = {name: numpy_helper.to_array(tensors[name]) for name in find_embedding_gathers(graph)}
    for node in list(graph.graph.node):
        weight = tensors.get(node.input[1]) if paths_of(node) else None
        if weight is None:
            continue
        for name, table in tables.items():
            if tuple(weight.dims) == table.shape[::-1] and np.array_equal(numpy_helper.to_array(weight), table.T):
                graph.graph.initializer.remove(tensors.pop(node.input[1]))
                graph.graph.node.insert(0, helper.make_node("Transpose", [name], [node.input[1]], f"{name}/transposed"))
                break


def count_stored_bits(bits: Literal[8, 4], width: int) -> float:
    """Computes the bits of a weight of the word embeddings, with its share of the scales, in rows of `width`."""
    return bits + 32 * (-(-width // BLOCK) if bits == 4 else 1) / width


def find_embedding_gathers(graph: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Finds the nodes that gather rows of float embedding tables, by the table's name.

    A table of relative positions (MPNet) does not count: its rows are added to attention scores.
    """
    from onnx import TensorProto

    tables = {
        tensor.name
        for tensor in graph.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2
    }
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        # A table that is tied to a task head may have the name of that.
        if (
            node.op_type == "Gather"
            and node.input[0] in tables
            and ("embed" in node.input[0] or _of_words(graph, node))
        ):
            found.setdefault(node.input[0], []).append(node)
    return found


def _of_words(graph: onnx.ModelProto, gather: onnx.NodeProto) -> bool:
    """True if rows are gathered by token ids, in any integer type."""
    casts = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "Cast"}
    name = gather.input[1]
    while name in casts:
        name = casts[name]
    return name == "input_ids"


def _finite(graph: onnx.ModelProto, name: str) -> Tensor:
    import torch
    from onnx import numpy_helper

    tensor = next(t for t in graph.graph.initializer if t.name == name)
    table = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    broken = int((~table.isfinite()).any(-1).sum())
    if broken:
        raise HfcompressError(
            f"{broken} of the {len(table)} rows of {name} hold values that are not finite",
            "train the model again, or start from an earlier checkpoint: such weights cannot be quantized",
        )
    return table


def _store(graph: onnx.ModelProto, name: str, codes: Tensor, scales: Tensor, bits: int) -> None:
    from onnx import TensorProto, helper, numpy_helper

    if bits == 8:
        stored = numpy_helper.from_array(codes.numpy(), f"{name}_int8")
    else:
        from torch.nn.functional import pad

        low, high = pad(codes.flatten(), (0, codes.numel() % 2)).view(-1, 2).unbind(-1)
        packed = (low & 15) | (high << 4)
        stored = helper.make_tensor(
            f"{name}_int4", TensorProto.INT4, tuple(codes.shape), packed.numpy().tobytes(), raw=True
        )
    graph.graph.initializer.extend([stored, numpy_helper.from_array(scales.numpy(), f"{name}_scales")])


def _gather_int8(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    from onnx import TensorProto, helper

    rows, floats, scales = (f"{node.output[0]}_{part}" for part in ("rows", "floats", "scales"))
    ids, base = node.input[1], node.name
    return [
        helper.make_node("Gather", [f"{table}_int8", ids], [rows], f"{base}_rows"),
        helper.make_node("Cast", [rows], [floats], f"{base}_floats", to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_scales", ids], [scales], f"{base}_scales"),
        helper.make_node("Mul", [floats, scales], [node.output[0]], f"{base}_scaled"),
    ]


def _gather_int4(node: onnx.NodeProto, table: str) -> list[onnx.NodeProto]:
    from onnx import helper

    inputs = [f"{table}_int4", node.input[1], f"{table}_scales"]
    options = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK}
    return [
        helper.make_node(
            "GatherBlockQuantized", inputs, list(node.output), f"{node.name}_int4", domain="com.microsoft", **options
        )
    ]


def _replace(graph: onnx.ModelProto, node: onnx.NodeProto, by: list[onnx.NodeProto]) -> None:
    place = list(graph.graph.node).index(node)
    graph.graph.node.remove(node)
    for offset, new in enumerate(by):
        graph.graph.node.insert(place + offset, new)
