"""Replaces the linear layers and the attention of a traced graph by operators that ONNX Runtime runs fast."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

DOMAIN = "hfcompress"
"""The ONNX domain of the operators that `trace` puts into a graph."""
PREFIX = "linear:"
"""The start of the names of the nodes that `linears` finds."""
HEADS_INWARD = [0, 2, 1, 3]
"""`(batch, length, heads, width)` to `(batch, heads, length, width)`, and back."""


def linears(model: ModelProto) -> dict[str, tuple[NodeProto, ...]]:
    """Finds the MatMul nodes that compute each `nn.Linear`, in the order of computation.

    The second input of a node is an initializer `(in_features, out_features)`; the next node adds the bias. Layers
    that read the same tensor (queries, keys and values) are one node, with their columns side by side in the order of
    their paths. A layer that runs several times (ALBERT) is several nodes that share the initializer.

    Returns:
        The nodes by the layer's path in the torch model.
    """
    found: dict[str, tuple[NodeProto, ...]] = {}
    for node in model.graph.node:
        for path in paths_of(node):
            found[path] = (*found.get(path, ()), node)
    return found


def paths_of(node: NodeProto) -> tuple[str, ...]:
    """Returns the paths of the `nn.Linear`s that a node computes, in the order of its columns; none for other nodes."""
    if not node.name.startswith(PREFIX):
        return ()
    return tuple(node.name.removeprefix(PREFIX).partition("#")[0].split("+"))


def fuse(model: ModelProto) -> ModelProto:
    """Replaces the nodes of `trace` in place: `Linear` by MatMul and Add, `Attention` by MultiHeadAttention."""
    from onnx.helper import make_opsetid

    _Rewriter(model.graph).run()
    kept = [x for x in model.opset_import if x.domain not in (DOMAIN, "com.microsoft")]
    del model.opset_import[:]
    model.opset_import.extend([*kept, make_opsetid("com.microsoft", 1)])
    return model


@dataclass
class _Rewriter:
    graph: GraphProto
    made: list[NodeProto] = field(default_factory=list)
    types: list[ValueInfoProto] = field(default_factory=list)

    def run(self) -> None:
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        together = self._group_by_input()
        self.runs: Counter[str] = Counter()
        for node in self.graph.node:
            if node.domain != DOMAIN:
                self.made.append(node)
            elif node.op_type == "Attention":
                self._attention(node)
            elif node.output[0] in together:
                self._linear(together[node.output[0]])
        self._keep_norms_apart()
        self._drop_unused()

    def add(self, kind: str, inputs: list[str], outputs: list[str], name: str = "", **attributes: Any) -> None:
        """Adds a node that is named after its output."""
        from onnx.helper import make_node

        self.made.append(make_node(kind, inputs, outputs, name=name or f"{outputs[0]}/{kind}", **attributes))

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Adds an initializer, unless the same one exists already; returns its name."""
        from onnx.numpy_helper import from_array

        if name not in self.weights:
            self.weights[name] = from_array(value, name)
            self.graph.initializer.append(self.weights[name])
        return name

    # Linear layers

    def _group_by_input(self) -> dict[str, list[NodeProto]]:
        """Groups the linear layers that become one node, by the output of the first of them.

        Such layers belong to one module and read the same tensor. Weights that are used both with others and alone (in
        DeBERTa, for the text and for relative positions) are not joined: they would be stored twice.
        """
        groups: dict[tuple[str, str], list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            if node.domain == DOMAIN and node.op_type == "Linear":
                groups[_path(node).rpartition(".")[0], node.input[0]].append(node)
        companies: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for nodes in groups.values():
            for node in nodes:
                companies[node.input[1]].add(tuple(x.input[1] for x in nodes))
        found = {}
        for nodes in groups.values():
            alone = any(len(companies[node.input[1]]) > 1 for node in nodes)
            found.update({x[0].output[0]: x for x in ([[node] for node in nodes] if alone else [nodes])})
        return found

    def _linear(self, nodes: list[NodeProto]) -> None:
        import numpy as np

        name, outputs = "+".join(_path(node) for node in nodes), [node.output[0] for node in nodes]
        weights = [self._value(node.input[1]) for node in nodes]
        widths = [len(weight) for weight in weights]
        biases = [
            self._value(node.input[2]) if len(node.input) > 2 else np.zeros(width, np.float32)
            for node, width in zip(nodes, widths, strict=True)
        ]
        biased = any(len(node.input) > 2 for node in nodes)
        whole = outputs[0] if len(nodes) == 1 else f"{outputs[0]}/whole"
        product = f"{whole}/product" if biased else whole
        weight = self.constant(f"{name}.weight", np.ascontiguousarray(np.concatenate(weights).T))
        number, self.runs[name] = self.runs[name], self.runs[name] + 1
        title = f"{PREFIX}{name}#{number}" if number else f"{PREFIX}{name}"
        self.add("MatMul", [nodes[0].input[0], weight], [product], title)
        if biased:
            self.add("Add", [product, self.constant(f"{name}.bias", np.concatenate(biases))], [whole])
        if len(nodes) > 1:
            sizes = self.constant(f"{name}.widths", np.array(widths, np.int64))
            self.add("Split", [whole, sizes], outputs, axis=-1)

    def _value(self, name: str) -> NDArray[Any]:
        from onnx.numpy_helper import to_array

        while name not in self.weights:  # the exporter stores equal tensors once, with Identity nodes for the others
            name = self.producers[name].input[0]
        return to_array(self.weights[name])

    # Attention

    def _attention(self, node: NodeProto) -> None:
        import numpy as np
        from onnx import TensorProto
        from onnx.helper import get_node_attr_value, make_tensor_value_info

        heads = get_node_attr_value(node, "num_heads")
        given = [self._join_heads(name, node) for name in node.input[:3]]
        bias = ["", "", node.input[3]] if len(node.input) > 3 else []
        mixed = f"{node.output[0]}/mixed"
        attributes = {key: get_node_attr_value(node, key) for key in ("num_heads", "unidirectional", "scale")}
        self.add("MultiHeadAttention", [*given, *bias], [mixed], domain="com.microsoft", **attributes)
        # onnx does not know this operator, but quantizers ask onnx for types.
        width = heads * get_node_attr_value(node, "width")
        self.types.append(make_tensor_value_info(mixed, TensorProto.FLOAT, ["batch", "sequence", width]))
        split = self.constant(f"{heads}.heads", np.array([0, 0, heads, -1], np.int64))
        self.add("Reshape", [mixed, split], [f"{mixed}/split"])
        self.add("Transpose", [f"{mixed}/split"], [node.output[0]], perm=HEADS_INWARD)
        for linear in self._readers_of_heads(node.output[0]):
            linear.input[0] = mixed

    def _join_heads(self, name: str, node: NodeProto) -> str:
        """Turns an attention input `(batch, heads, length, width)` into `(batch, length, heads * width)`."""
        import numpy as np

        outward = self._before(name, "Transpose")
        if outward is not None:
            linear = self.producers.get(self._before(outward, "Reshape") or "")
            if linear is not None and linear.domain == DOMAIN and _rank(linear) == 3:
                return linear.output[0]
        if outward is None:
            outward = f"{node.output[0]}/{name}"
            self.add("Transpose", [name], [outward], perm=HEADS_INWARD)
        joined = f"{node.output[0]}/{outward}/joined"
        self.add("Reshape", [outward, self.constant("joined.heads", np.array([0, 0, -1], np.int64))], [joined])
        return joined

    def _before(self, name: str, kind: str) -> str | None:
        """Returns the input of the node that made `name`, if it has this kind; a Transpose must swap heads and
        length.
        """
        node = self.producers.get(name)
        if node is None or node.op_type != kind:
            return None
        otherwise = kind == "Transpose" and list(node.attribute[0].ints) != HEADS_INWARD
        return None if otherwise else node.input[0]

    def _readers_of_heads(self, name: str, turned: bool = False) -> list[NodeProto]:
        """Finds the linear layers that read an attention node's output, after its heads are joined."""
        found = []
        for node in self.readers[name]:
            if node.op_type == "Reshape" and node.input[0] == name:
                found += self._readers_of_heads(node.output[0], turned)
            elif not turned and self._before(node.output[0], "Transpose") == name:
                found += self._readers_of_heads(node.output[0], turned=True)
            elif turned and node.domain == DOMAIN and _rank(node) == 3:
                found.append(node)
        return found

    def _keep_norms_apart(self) -> None:
        """Replaces the addition before a layer norm by `Sum`, which ONNX Runtime does not fuse with the norm.

        On a CPU the fused operator (SkipLayerNormalization) is several times slower than the two separate ones.
        """
        made = {node.output[0]: node for node in self.made}
        for node in self.made:
            before = made.get(node.input[0]) if node.op_type == "LayerNormalization" else None
            if before is not None and before.op_type == "Add" and not self.weights.keys() & set(before.input):
                before.op_type = "Sum"

    def _drop_unused(self) -> None:
        """Removes the nodes and initializers that no output depends on."""
        read = {output.name for output in self.graph.output}
        kept = []
        for node in reversed(self.made):
            if read.intersection(node.output):
                kept.append(node)
                read.update(_names_read_by(node))
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        initializers = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(initializers)
        del self.graph.value_info[:]
        self.graph.value_info.extend(self.types)


def _names_read_by(node: NodeProto) -> Iterator[str]:
    """Yields the names that a node reads, and those that the graphs inside it (of an `If`) read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _names_read_by(inner)


def _path(node: NodeProto) -> str:
    from onnx.helper import get_node_attr_value

    return get_node_attr_value(node, "path").decode()


def _rank(node: NodeProto) -> int:
    from onnx.helper import get_node_attr_value

    return get_node_attr_value(node, "rank")
