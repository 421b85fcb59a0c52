"""The exported graph: exact for every family, head and pruned shape, and made of what ONNX Runtime is fast at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.export import export, quiet
from hfcompress.onnx.fuse import fuse, linears, paths_of
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.pruning.hidden_dimensions import cut_hidden
from tests import factories

OWN_ATTENTION = ("deberta-v2", "mpnet")
"""Families that do not compute attention by `scaled_dot_product_attention`."""
EXPORTED = [
    *((family, "sequence", "stock") for family in sorted(ARCHITECTURES)),
    *(("bert", head, "stock") for head in ("token", "span", "mask")),
    *(("modernbert", "mask", "stock"), ("albert", "mask", "stock"), ("qwen3", "causal", "stock")),
    *((family, "sequence", "uneven") for family in ("bert", "distilbert", "albert", "mpnet", "modernbert", "llama")),
    *((family, "sequence", "empty") for family in ("bert", "modernbert", "deberta-v2")),
    *((family, "sequence", "narrow") for family in ("bert", "qwen2")),
]
exported = pytest.mark.parametrize(("family", "head", "layout"), EXPORTED)
HALF = tuple(range(1, 64, 2))
Export = Callable[..., tuple[Any, Path]]


def build(family: str, head: str = "sequence", layout: str = "stock") -> Any:
    model = factories.model(family, head=head, labels=2 if head == "span" else 3)
    if layout == "narrow":
        return cut_hidden(model, tuple(range(0, 32, 2)))
    if layout == "stock":
        return model
    spec = ARCHITECTURES[family]
    every = (0, 1) if spec.decoder else (0, 1, 2, 3)  # a decoder's are groups of two
    layers = [Keep((1,), HALF), Keep((), ()) if layout == "empty" else Keep(every, (5, 6, 60))]
    return cut(model, layers[: 1 if spec.shared_layers else 2])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model and its graph, once for equal arguments."""

    @cache
    def make(family: str, head: str = "sequence", layout: str = "stock") -> tuple[Any, Path]:
        model, path = build(family, head, layout), tmp_path_factory.mktemp("graph") / "model.onnx"
        with quiet():
            export(model, path, arrays(3, 9))
        return model, path

    return make


def arrays(rows: int, length: int) -> dict[str, Any]:
    return {name: value.numpy() for name, value in factories.batch(rows, length, seed=rows).items()}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@exported
def test_it_answers_as_the_model_does_to_batches_and_lengths_never_seen(
    family: str, head: str, layout: str, made: Export
) -> None:
    model, path = made(family, head, layout)
    for rows, length in ((1, 5), (5, 23), (2, 1)):
        probe = arrays(rows, length)
        found, expected = run_onnx(path, probe), logits_of(model, probe)
        real = probe["attention_mask"].astype(bool) if head != "sequence" else slice(None)
        assert found.shape == expected.shape
        assert np.allclose(found[real], expected[real], atol=1e-5), (rows, length)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_a_padded_row_answers_as_it_does_alone(family: str, made: Export) -> None:
    _, path = made(family)
    probe = arrays(4, 17)
    together = run_onnx(path, probe)
    for row, length in enumerate(probe["attention_mask"].sum(1)):
        alone = run_onnx(path, {name: value[row : row + 1, :length] for name, value in probe.items()})
        assert np.allclose(alone[0], together[row], atol=1e-5)


@exported
def test_every_linear_layer_is_found_with_its_weights(family: str, head: str, layout: str, made: Export) -> None:
    model, path = made(family, head, layout)
    graph = onnx.load(path)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = linears(graph)
    assert found.keys() == modules.keys()
    for path_, nodes in found.items():
        for node in nodes:
            assert node.op_type == "MatMul"
            ends = np.cumsum([0, *(modules[other].out_features for other in paths_of(node))])
            place = paths_of(node).index(path_)
            columns = weights[node.input[1]][:, ends[place] : ends[place + 1]]
            assert np.array_equal(columns, modules[path_].weight.detach().numpy().T)
    named = [node for node in graph.graph.node if paths_of(node)]
    with_weights = [n for n in graph.graph.node if n.op_type in ("MatMul", "Gemm") and set(n.input) & weights.keys()]
    assert named == with_weights
    assert len({node.name for node in graph.graph.node}) == len(graph.graph.node)


def test_queries_keys_and_values_are_one_product(made: Export) -> None:
    found = linears(onnx.load(made("bert")[1]))
    base = "bert.encoder.layer.1.attention.self."
    (node,) = found[f"{base}key"]
    assert paths_of(node) == (f"{base}query", f"{base}key", f"{base}value")
    assert found[f"{base}query"] == found[f"{base}value"] == (node,)
    assert paths_of(found["bert.encoder.layer.1.output.dense"][0]) == ("bert.encoder.layer.1.output.dense",)


def test_a_layer_that_runs_twice_is_two_nodes_of_one_weight(made: Export) -> None:
    found = linears(onnx.load(made("albert")[1]))
    first, second = found["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"]
    assert first.input[1] == second.input[1]
    assert first.input[0] != second.input[0]


def test_weights_that_read_the_text_and_relative_positions_are_stored_once(made: Export) -> None:
    model, path = made("deberta-v2")
    graph = onnx.load(path)
    assert len(linears(graph)["deberta.encoder.layer.0.attention.self.key_proj"]) == 2
    stored = sum(int(np.prod(t.dims)) for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert stored <= sum(parameter.numel() for parameter in model.parameters()) * 1.01


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - set(OWN_ATTENTION)))
def test_attention_is_one_operator_a_layer(family: str, made: Export) -> None:
    found = operators(made(family)[1])
    assert found["MultiHeadAttention"] == 2
    assert found["Softmax"] == 0


def test_an_encoder_s_attention_reads_and_feeds_its_linear_layers_directly(made: Export) -> None:
    path = made("bert")[1]
    assert operators(path)["Transpose"] == 0
    nodes = onnx.load(path).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type == "MultiHeadAttention":
            assert [made_by[name].op_type for name in node.input[:3]] == ["Split"] * 3
            assert {paths_of(n)[0][-22:] for n in nodes if node.output[0] in n.input} == {"attention.output.dense"}


def test_a_pruned_layer_s_attention_has_the_heads_that_stayed(made: Export) -> None:
    nodes = onnx.load(made("bert", "sequence", "uneven")[1]).graph.node
    heads = [a.i for n in nodes if n.op_type == "MultiHeadAttention" for a in n.attribute if a.name == "num_heads"]
    assert heads == [1, 4]
    assert operators(made("bert", "sequence", "empty")[1])["MultiHeadAttention"] == 1


def test_the_mask_is_made_once_for_all_layers(made: Export) -> None:
    path = made("bert")[1]
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MultiHeadAttention"]
    assert len({node.input[5] for node in nodes}) == 1


def test_onnxruntime_makes_no_slow_norm_of_it(made: Export, tmp_path: Path) -> None:
    """SkipLayerNormalization, which it makes of int8 graphs with plain sums, takes several times as long."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    with quiet():
        quantize_dynamic(made("bert")[1], tmp_path / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True)
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    found = operators(tmp_path / "optimized.onnx")
    assert (found["LayerNormalization"], found["SkipLayerNormalization"]) == (5, 0)
    assert found["DynamicQuantizeMatMul"] + found["MatMulIntegerToFloat"] == 10
    assert found["Gelu"] == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_is_left_as_it_was(attention: str, tmp_path: Path) -> None:
    from torch.nn import functional

    before = functional.linear, functional.scaled_dot_product_attention
    model = build("bert")
    model.set_attn_implementation(attention)
    with quiet():
        export(model, tmp_path / "model.onnx", arrays(2, 6))
    assert model.config._attn_implementation == attention
    assert (functional.linear, functional.scaled_dot_product_attention) == before
    assert not model._forward_pre_hooks
    assert operators(tmp_path / "model.onnx")["MultiHeadAttention"] == 2


def test_a_failed_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    from torch.nn import functional

    linear, model = functional.linear, build("bert")
    model.set_attn_implementation("eager")
    with pytest.raises(IndexError), quiet():
        export(model, tmp_path / "model.onnx", {name: value + 100 for name, value in arrays(2, 6).items()})
    assert model.config._attn_implementation == "eager"
    assert functional.linear is linear


def test_equal_tensors_that_are_stored_once_are_found(tmp_path: Path) -> None:
    model = factories.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    with quiet():
        export(model, tmp_path / "model.onnx", arrays(3, 9))
    probe = arrays(4, 7)
    assert np.allclose(run_onnx(tmp_path / "model.onnx", probe), logits_of(model, probe), atol=1e-5)


def test_what_only_a_branch_reads_stays() -> None:
    numbers = TensorProto.FLOAT
    given = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in
             (("x", numbers, ["batch"]), ("yes", TensorProto.BOOL, []))]  # fmt: skip
    answer = helper.make_tensor_value_info("y", numbers, ["batch"])
    branches = {
        f"{side}_branch": helper.make_graph(
            [helper.make_node("Add", ["double", weight], [side])], side, [],
            [helper.make_tensor_value_info(side, numbers, ["batch"])],
        )
        for side, weight in (("then", "one"), ("else", "two"))
    }  # fmt: skip
    nodes = [helper.make_node("Add", ["x", "x"], ["double"]), helper.make_node("If", ["yes"], ["y"], **branches)]
    weights = [numpy_helper.from_array(np.float32([value]), name) for name, value in (("one", 1), ("two", 2))]
    graph = fuse(helper.make_model(helper.make_graph(nodes, "g", given, [answer], weights)))
    assert {tensor.name for tensor in graph.graph.initializer} == {"one", "two"}
    assert [node.op_type for node in graph.graph.node] == ["Add", "If"]
