"""Quantizes the linear layers of a graph to int8."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from hfcompress.onnx.export import quiet
from hfcompress.onnx.fuse import paths_of
from hfcompress.onnx.graph_io import is_large, strip_weights
from hfcompress.quantization.grids.ranges import LARGEST, Ranges, scale_and_zero_point
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


def find_linear_nodes(graph: onnx.ModelProto, keep: Collection[str]) -> list[onnx.NodeProto]:
    """Finds the nodes that are linear layers, except those that compute a layer of `keep`.

    Queries, keys and values are one node: if one of them is kept, all are.
    """
    return [node for node in graph.graph.node if paths_of(node) and not set(paths_of(node)) & set(keep)]


def quantize_dynamic(
    graph: onnx.ModelProto, keep: Collection[str] = (), per_channel: bool = True, reduce_range: bool = False
) -> onnx.ModelProto:
    """Returns the graph with int8 weights, and with uint8 inputs in the range of each batch, padding included.

    It calls ONNX Runtime's `quantize_dynamic`.

    Args:
        graph: A float graph, see `fuse.linears`.
        keep: Paths of the layers that stay in float32.
        per_channel: True for a scale for each output channel, False for one for the matrix of a node.
        reduce_range: True for weights of 7 bits.
    """
    import onnx
    from onnxruntime import quantization

    with scratch_directory() as folder, quiet():
        path = folder / "model.onnx"
        quantization.quantize_dynamic(
            graph,
            path,
            weight_type=quantization.QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in find_linear_nodes(graph, keep)],
            use_external_data_format=is_large(graph),
            # Shape inference stops at operators of ONNX Runtime, such as attention.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)


def quantize_static(graph: onnx.ModelProto, ranges: Ranges, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Returns the graph with int8 weights, and with uint8 inputs in fixed ranges: a QDQ graph.

    The input of each layer passes QuantizeLinear and DequantizeLinear, and its weights pass DequantizeLinear; its
    output is a float. ONNX Runtime joins the three nodes to one product of integers (`MatMulIntegerToFloat`, `QGemm`).
    Unlike a dynamic product, `MatMulIntegerToFloat` does not include the bias, which costs about as much time as the
    fixed range saves.

    onnxruntime's `quantize_static` was tried and not chosen. It calibrates and quantizes tensors; this function gets
    ranges by layer, from training or from `calibration` without padding. `quantize_static` takes the weight scales of a
    trained model only as overrides by tensor name.

    Args:
        graph: A float graph, see `fuse.linears`.
        ranges: The ranges of inputs and the scales of weights of all layers except the kept ones. Layers that are one
            node (queries, keys and values) use a range that covers all of theirs.
        keep: Paths of the layers that stay in float32.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    _QdqBuilder(copy, ranges).quantize({node.name for node in find_linear_nodes(graph, keep)})
    return copy


class _QdqBuilder:
    """Puts QuantizeLinear and DequantizeLinear around the products of a graph."""

    def __init__(self, model: onnx.ModelProto, ranges: Ranges) -> None:
        self.graph, self.ranges = model.graph, ranges
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        matrices = _find_matrices(model)
        self.biases = {
            node.input[0]: node
            for node in model.graph.node
            if node.op_type == "Add" and node.input[0] in matrices and node.input[1] in self.tensors
        }
        self.nodes: list[onnx.NodeProto] = []

    def quantize(self, names: Collection[str]) -> None:
        """Quantizes the nodes of these names, and removes tensors that no node reads any more."""
        within: set[str] = set()
        for node in self.graph.node:
            if node.name in names:
                within.update(self.add_product(node, self.biases.get(node.output[0])))
            elif node.output[0] not in within:
                self.nodes.append(node)
        read = {name for node in self.nodes for name in node.input}
        initializers = [tensor for tensor in self.tensors.values() if tensor.name in read]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(initializers)

    def add_product(self, node: onnx.NodeProto, bias: onnx.NodeProto | None) -> Collection[str]:
        """Adds a linear layer, with its bias if it is a product of matrices: ONNX Runtime would make both a float Gemm.

        Returns:
            The names of its outputs.
        """
        import numpy as np
        from onnx import helper

        paths = paths_of(node)
        scale, zero = self.activation_grid(paths)
        scales = np.concatenate([self.ranges.scales[path].float().cpu().numpy() for path in paths])
        if bias is not None:
            scales = self.enlarge_for_bias(scales, node.input[1], np.abs(self.value(bias.input[1])) / scale)
        inputs = [self.add_activation(node.input[0], scale, zero), self.add_weight(node.input[1], scales)]
        kind, output = ("MatMul", node.output) if bias is None else ("Gemm", bias.output)
        if bias is not None:
            inputs.append(self.add_bias(bias.input[1], scale * scales))
        self.nodes.append(helper.make_node(kind, inputs, output, node.name))
        return output

    def activation_grid(self, paths: tuple[str, ...]) -> tuple[Any, int]:
        """Computes scale and zero point of the range that covers the ranges of these layers."""
        import numpy as np

        lows, highs = zip(*(self.ranges.inputs[path] for path in paths), strict=True)
        scale, zero = scale_and_zero_point(min(lows), max(highs))
        return np.float32(scale), zero

    def enlarge_for_bias(self, scales: NDArray[Any], weight: str, bias: NDArray[Any]) -> NDArray[Any]:
        """Enlarges the scales of columns whose bias would not fit into 31 bits; weights and bias share them.

        This happens if a bias is much larger than its weights, or if all of these are 0.

        Args:
            scales: The scales of the columns.
            weight: The name of the weights.
            bias: The absolute biases, divided by the input's scale.
        """
        import numpy as np

        needed = np.where(self.value(weight).any(0), scales, 0)
        found = np.maximum(needed, bias / 2**30).astype(np.float32)
        return np.where(found > 0, found, 1).astype(np.float32)

    def value(self, name: str) -> NDArray[Any]:
        """Returns the array of an initializer."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[name])

    def add_activation(self, name: str, scale: NDArray[Any], zero: int) -> str:
        """Quantizes and dequantizes a tensor, once for equal grids; returns the result's name."""
        import numpy as np

        base = f"{name}/{scale},{zero}"
        if f"{base}/scale" not in self.tensors:
            grid = [self.add_constant(f"{base}/scale", scale), self.add_constant(f"{base}/zero", np.uint8(zero))]
            self.add_node("QuantizeLinear", [name, *grid], f"{base}/uint8")
            self.add_node("DequantizeLinear", [f"{base}/uint8", *grid], f"{base}/float")
        return f"{base}/float"

    def add_weight(self, name: str, scales: NDArray[Any]) -> str:
        """Stores a product's weights `(in_features, out_features)` in int8; returns the name of their floats."""
        import numpy as np

        if f"{name}/int8" not in self.tensors:
            codes = np.clip(np.rint(self.value(name) / scales), -LARGEST, LARGEST)
            self.store(name, codes.astype(np.int8), scales, axis=1)
        return f"{name}/float"

    def add_bias(self, name: str, scales: NDArray[Any]) -> str:
        """Stores a bias in int32; returns the name of its floats."""
        import numpy as np

        self.store(name, np.rint(self.value(name) / scales).astype(np.int32), scales, axis=0)
        return f"{name}/float"

    def store(self, name: str, codes: NDArray[Any], scales: NDArray[Any], axis: int) -> None:
        """Stores integers and dequantizes them by their scales, by a single scale if all are equal."""
        import numpy as np

        one = (scales == scales[0]).all()
        scales = scales[0] if one else scales
        inputs = [
            self.add_constant(f"{name}/{codes.dtype}", codes),
            self.add_constant(f"{name}/scale", scales),
            self.add_constant(f"{name}/zero", np.zeros_like(scales, codes.dtype)),
        ]
        self.add_node("DequantizeLinear", inputs, f"{name}/float", **({} if one else {"axis": axis}))

    def add_constant(self, name: str, value: Any) -> str:
        """Adds an initializer; returns its name."""
        from onnx import numpy_helper

        self.tensors[name] = numpy_helper.from_array(value, name)
        return name

    def add_node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Adds a node that is named after its output."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))


def _find_matrices(graph: onnx.ModelProto) -> set[str]:
    """Returns the names of the values that have two dimensions."""
    from onnx import shape_inference

    values = shape_inference.infer_shapes(strip_weights(graph)).graph
    return {
        value.name
        for value in [*values.value_info, *values.output]
        if value.type.tensor_type.HasField("shape") and len(value.type.tensor_type.shape.dim) == 2
    }
