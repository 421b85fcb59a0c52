"""The linear layers of a graph in int8."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from hfcompress.onnx.export import quiet
from hfcompress.onnx.fuse import paths_of
from hfcompress.onnx.graph_files import is_large, without_weights
from hfcompress.quantization.grids.ranges import LARGEST, Ranges, affine
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray


def nodes_without(graph: onnx.ModelProto, keep: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes of a graph that are linear layers, but those that compute one of the layers of `keep`.

    Queries, keys and values are one node, and so are either all kept or none.
    """
    return [node for node in graph.graph.node if paths_of(node) and not set(paths_of(node)) & set(keep)]


def dynamic(
    graph: onnx.ModelProto, keep: Collection[str] = (), per_channel: bool = True, reduce_range: bool = False
) -> onnx.ModelProto:
    """The graph with linear layers of int8 weights, whose inputs get their uint8 grid from each batch with its padding.

    Args:
        graph: A float graph, see `fuse.linears`.
        keep: Paths of the layers that stay in float.
        per_channel: A step for each output channel instead of one for the matrix of a node.
        reduce_range: Weights of 7 bits.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with scratch_directory() as folder, quiet():
        path = folder / "model.onnx"
        quantize_dynamic(
            graph,
            path,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[node.name for node in nodes_without(graph, keep)],
            use_external_data_format=is_large(graph),
            # Shape inference ends at an operator of ONNX Runtime's own, such as attention.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)


def static(graph: onnx.ModelProto, grid: Ranges, keep: Collection[str] = ()) -> onnx.ModelProto:
    """The graph with linear layers of int8 weights, whose inputs are on fixed uint8 grids: a QDQ graph.

    Before each layer its input passes QuantizeLinear and DequantizeLinear, its weights DequantizeLinear; what comes out
    is a float. ONNX Runtime makes one product of integers of the three (`MatMulIntegerToFloat`, `QGemm`). It takes the
    bias into a dynamic product, not into the former of these, which costs about what the fixed grid saves.
    onnxruntime's own quantizer takes ranges of tensors, not of layers, and steps of weights channel by channel, as
    options.

    Args:
        graph: A float graph, see `fuse.linears`.
        grid: Ranges of the inputs and steps of the weights of all layers but the kept ones. Layers that are one node
            (queries, keys and values) read on the widest of their ranges.
        keep: Paths of the layers that stay in float.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(graph)
    _Builder(made, grid).run({node.name for node in nodes_without(graph, keep)})
    return made


class _Builder:
    """Puts the nodes around products, each as often as it is needed."""

    def __init__(self, made: onnx.ModelProto, grid: Ranges) -> None:
        self.graph, self.grid = made.graph, grid
        self.tensors = {tensor.name: tensor for tensor in made.graph.initializer}
        matrices = _matrices(made)
        self.biases = {
            node.input[0]: node
            for node in made.graph.node
            if node.op_type == "Add" and node.input[0] in matrices and node.input[1] in self.tensors
        }
        self.nodes: list[onnx.NodeProto] = []

    def run(self, names: Collection[str]) -> None:
        """Quantizes the nodes of these names, and drops what nobody reads any more."""
        within: set[str] = set()
        for node in self.graph.node:
            if node.name in names:
                within.update(self.product(node, self.biases.get(node.output[0])))
            elif node.output[0] not in within:
                self.nodes.append(node)
        read = {name for node in self.nodes for name in node.input}
        initializers = [tensor for tensor in self.tensors.values() if tensor.name in read]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(initializers)

    def product(self, node: onnx.NodeProto, bias: onnx.NodeProto | None) -> Collection[str]:
        """A linear layer; of matrices with its bias, since ONNX Runtime would make a float Gemm of a product and a sum.

        Returns:
            What it gives.
        """
        import numpy as np
        from onnx import helper

        paths = paths_of(node)
        scale, zero = self.activation_grid(paths)
        steps = np.concatenate([self.grid.steps[path].float().cpu().numpy() for path in paths])
        if bias is not None:
            steps = self.with_room(steps, node.input[1], np.abs(self.value(bias.input[1])) / scale)
        inputs = [self.activation(node.input[0], scale, zero), self.weight(node.input[1], steps)]
        kind, output = ("MatMul", node.output) if bias is None else ("Gemm", bias.output)
        if bias is not None:
            inputs.append(self.bias(bias.input[1], scale * steps))
        self.nodes.append(helper.make_node(kind, inputs, output, node.name))
        return output

    def activation_grid(self, paths: tuple[str, ...]) -> tuple[Any, int]:
        import numpy as np

        lows, highs = zip(*(self.grid.inputs[path] for path in paths), strict=True)
        scale, zero = affine(min(lows), max(highs))
        return np.float32(scale), zero

    def with_room(self, steps: NDArray[Any], weight: str, bias: NDArray[Any]) -> NDArray[Any]:
        """Steps that hold each column's bias, of so many steps of the input, in 31 bits; they are the bias's too.

        They differ from what was given where a bias dwarfs its weights, or there are none.
        """
        import numpy as np

        needed = np.where(self.value(weight).any(0), steps, 0)
        found = np.maximum(needed, bias / 2**30).astype(np.float32)
        return np.where(found > 0, found, 1).astype(np.float32)

    def value(self, name: str) -> NDArray[Any]:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[name])

    def activation(self, name: str, scale: NDArray[Any], zero: int) -> str:
        """The name of a tensor as it is on a grid."""
        import numpy as np

        base = f"{name}/{scale},{zero}"
        if f"{base}/scale" not in self.tensors:
            grid = [self.constant(f"{base}/scale", scale), self.constant(f"{base}/zero", np.uint8(zero))]
            self.node("QuantizeLinear", [name, *grid], f"{base}/uint8")
            self.node("DequantizeLinear", [f"{base}/uint8", *grid], f"{base}/float")
        return f"{base}/float"

    def weight(self, name: str, steps: NDArray[Any]) -> str:
        """The name of a product's weights `(in_features, out_features)`, read from int8."""
        import numpy as np

        if f"{name}/int8" not in self.tensors:
            levels = np.clip(np.rint(self.value(name) / steps), -LARGEST, LARGEST)
            self.stored(name, levels.astype(np.int8), steps, axis=1)
        return f"{name}/float"

    def bias(self, name: str, steps: NDArray[Any]) -> str:
        """The name of a bias, read from int32."""
        import numpy as np

        self.stored(name, np.rint(self.value(name) / steps).astype(np.int32), steps, axis=0)
        return f"{name}/float"

    def stored(self, name: str, levels: NDArray[Any], steps: NDArray[Any], axis: int) -> None:
        """Integers and their steps, one for all where all are the same."""
        import numpy as np

        one = (steps == steps[0]).all()
        steps = steps[0] if one else steps
        inputs = [
            self.constant(f"{name}/{levels.dtype}", levels),
            self.constant(f"{name}/scale", steps),
            self.constant(f"{name}/zero", np.zeros_like(steps, levels.dtype)),
        ]
        self.node("DequantizeLinear", inputs, f"{name}/float", **({} if one else {"axis": axis}))

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.tensors[name] = numpy_helper.from_array(value, name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))


def _matrices(graph: onnx.ModelProto) -> set[str]:
    """The names of the values that have two dimensions."""
    from onnx import shape_inference

    values = shape_inference.infer_shapes(without_weights(graph)).graph
    return {
        value.name
        for value in [*values.value_info, *values.output]
        if value.type.tensor_type.HasField("shape") and len(value.type.tensor_type.shape.dim) == 2
    }
