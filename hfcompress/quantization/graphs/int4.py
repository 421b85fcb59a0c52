"""Quantizes the linear layers of a graph to blocks of 4-bit weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.quantization.graphs.int8 import find_linear_nodes
from hfcompress.quantization.grids.blockwise import LOWEST, quantize_blockwise

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from torch import Tensor

INT8 = 4
"""The `accuracy_level` that rounds inputs to int8, block by block, and multiplies integers."""


def quantize_linears(
    graph: onnx.ModelProto, size: int, compute: Literal["int8", "float32"], keep: Collection[str] = ()
) -> None:
    """Replaces linear layers by `MatMulNBits` nodes with the codes of `quantize_blockwise`, in place.

    onnxruntime's own quantizer writes the same bytes, but was not chosen: it needs a package that onnxruntime does not
    install, configures the root logger when it is imported, and stores the weights of a layer that runs twice twice.

    Args:
        graph: A float graph, see `fuse.linears`.
        size: The size of a block: 16 or a larger power of two.
        compute: The type of the products.
        keep: Paths of the layers that stay in float32.
    """
    import torch
    from onnx import helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in find_linear_nodes(graph, keep):
        inputs, name = node.input
        packed, scales = f"{name}/int4", f"{name}/scales"
        columns, rows = tensors[name].dims
        if packed not in tensors:
            weight = torch.from_numpy(numpy_helper.to_array(tensors[name]).T.copy())
            codes, steps = quantize_blockwise(weight, size)
            tensors[packed] = numpy_helper.from_array(_pack(codes, size), packed)
            tensors[scales] = numpy_helper.from_array(steps.flatten().numpy(), scales)
        options = {"K": columns, "N": rows, "bits": 4, "block_size": size}
        options |= {"accuracy_level": INT8} if compute == "int8" else {}
        node.CopyFrom(
            helper.make_node(
                "MatMulNBits",
                [inputs, packed, scales],
                list(node.output),
                node.name,
                domain="com.microsoft",
                **options,
            )
        )
    read = {name for node in graph.graph.node for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def _pack(codes: Tensor, size: int) -> NDArray[Any]:
    """Packs codes into bytes `(rows, blocks, size / 2)`, the first of two in the lower half; 8 stands for 0."""
    from torch.nn.functional import pad

    whole = pad(codes - LOWEST, (0, -codes.shape[1] % size), value=-LOWEST).byte()
    low, high = whole.reshape(len(codes), -1, size // 2, 2).unbind(-1)
    return (low | high << 4).numpy()
