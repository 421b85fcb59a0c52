"""The backend on Optimum itself: what it stores, what it answers, and who can load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from hfcompress.measure.verify import verify
from hfcompress.models.artifact import load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.quantization.backends import optimum_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.optimum.loaded import CLASSES, answers, auto_class

HIDDEN, FFN, LINEARS = 128, 256, 14
"""Of two layers, their pooler and classifier."""
UNEVEN = [Keep((1, 3), tuple(range(192))), Keep((0, 1, 2, 3), tuple(range(0, 256, 4)))]
STATIC = {"mode": "static", "rows": 8}
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "minmax": STATIC,
    "percentile": {**STATIC, "calibration": "percentile"},
    "entropy": {**STATIC, "calibration": "entropy"},
}
# Of the largest logit; static grids are narrower than what random tokens ask for, and by entropy they are cut hard.
NEAR = {"dynamic": 0.1, "minmax": 0.25, "percentile": 0.25, "entropy": 0.6}


@dataclass(frozen=True)
class Made:
    path: Path
    source: Path
    probe: Any
    logits: Any
    """What `quantize` returned."""

    @property
    def graph(self) -> Any:
        return onnx.load(self.path / "onnx" / "model_quantized.onnx").graph

    @property
    def weights(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    @property
    def kinds(self) -> Counter[str]:
        return Counter(node.op_type for node in self.graph.node)

    def dtypes(self, *dims: int) -> set[int]:
        """Of the initializers of one shape."""
        return {tensor.data_type for tensor in self.weights.values() if tuple(tensor.dims) == dims}


def rows(count: int, padding: int = 0) -> list[dict[str, Any]]:
    """So many rows in two batches, each padded further."""
    batches = [factories.batch(count // 2, length, seed=length) for length in (9, 14)]
    return [{k: np.pad(v.numpy(), ((0, 0), (0, padding))) for k, v in batch.items()} for batch in batches]


Quantized = Callable[..., Made]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def source(family: str, head: str, uneven: bool) -> Path:
        path, model = tmp_path_factory.mktemp("float"), factories.model(family, hidden=HIDDEN, ffn=FFN, head=head)
        save_model(cut(model, UNEVEN) if uneven else model, factories.tokenizer(), path)
        return path

    @cache
    def make(
        family: str = "bert", head: str = "sequence", uneven: bool = False, padding: int = 0, **options: Any
    ) -> Made:
        origin, target = source(family, head, uneven), tmp_path_factory.mktemp("int8")
        probe = make_dummy_inputs(origin)
        job = QuantizationJob(origin, target, auto_class(head), probe, partial(rows, padding=padding))
        logits = BACKENDS.parse({"use": "optimum_onnx", **options}).quantize(job).logits
        return Made(target, origin, probe, logits)

    return make


def plain(made: Made, head: str = "sequence") -> Any:
    return logits_of(load_model(made.source, auto_class(head)), made.probe)


def relative(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_it_answers_like_the_float_model_and_the_same_in_optimum_s_class(
    way: str, uneven: bool, quantized: Quantized
) -> None:
    made = quantized(uneven=uneven, **WAYS[way])
    assert 0 < relative(made.logits, plain(made)) <= NEAR[way]
    assert np.array_equal(answers(made.path, "sequence", made.probe), made.logits)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
@pytest.mark.parametrize("head", CLASSES)
def test_every_head_loads_in_its_class(head: str, family: str, quantized: Quantized) -> None:
    made = quantized(family, head)
    assert relative(made.logits, plain(made, head)) <= 0.15
    assert np.array_equal(answers(made.path, head, made.probe), made.logits)


@pytest.mark.parametrize(("head", "way"), [("sequence", "minmax"), ("span", "dynamic")])
def test_it_answers_the_same_in_a_fresh_process(head: str, way: str, quantized: Quantized) -> None:
    made = quantized(head=head, uneven=True, **WAYS[way])
    factories.tokenizer().save_pretrained(made.path)
    artifact = open_artifact(made.path)
    assert (artifact.runtime, artifact.dtype) == ("onnx", "int8")
    assert artifact.shape == open_artifact(made.source).shape
    assert set(verify(artifact, made.logits, auto_class(head))) == {"onnx"}


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_weights_and_tables_in_the_file_are_int8(mode: str, quantized: Quantized) -> None:
    made = quantized(**(STATIC if mode == "static" else {}))
    for dims in ((HIDDEN, HIDDEN), (HIDDEN, FFN), (FFN, HIDDEN)):
        assert made.dtypes(*dims) == {TensorProto.INT8}
    for dims in ((len(factories.WORDS), HIDDEN), (40, HIDDEN)):
        assert made.dtypes(*dims) == {TensorProto.UINT8}
    assert not [t.name for t in made.weights.values() if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert sorted(path.name for path in made.path.rglob("*.onnx*")) == ["model_quantized.onnx"]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_plan_s_bytes_are_those_on_disk(mode: str, quantized: Quantized) -> None:
    made = quantized(**(STATIC if mode == "static" else {}))
    shape = open_artifact(made.source).shape
    assert shape is not None
    planned = BACKENDS.parse("optimum_onnx").plan(shape).bytes
    assert open_artifact(made.path).disk_bytes == pytest.approx(planned, rel=0.25)
    assert planned < 0.35 * shape.bytes


def test_products_of_two_activations_stay_in_float(quantized: Quantized) -> None:
    dynamic, static = quantized().kinds, quantized(**STATIC).kinds
    assert (dynamic["MatMulInteger"], dynamic["MatMul"]) == (LINEARS, 4)
    assert static["MatMul"] + static["Gemm"] == LINEARS + 4
    graph = quantized(**STATIC).graph
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert sum(set(node.input[:2]) <= dequantized for node in products) == LINEARS
    assert sum(not set(node.input[:2]) & dequantized for node in products) == 4


def test_tables_can_stay_in_float(quantized: Quantized) -> None:
    made = quantized(embeddings=False)
    assert made.dtypes(len(factories.WORDS), HIDDEN) == {TensorProto.FLOAT}
    assert made.dtypes(HIDDEN, FFN) == {TensorProto.INT8}


def test_a_scale_a_channel_or_one_a_matrix(quantized: Quantized) -> None:
    def largest(made: Made) -> int:
        return max(int(np.prod(t.dims)) for name, t in made.weights.items() if name.endswith("_scale"))

    assert largest(quantized()) == FFN
    assert largest(quantized(per_channel=False)) == 1


# Calibration


def activation_scales(made: Made) -> list[float]:
    """Of what is quantized while the graph runs, in its order."""
    values = [numpy_helper.to_array(made.weights[n.input[1]]) for n in made.graph.node if n.op_type == "QuantizeLinear"]
    return [float(value) for value in values]


@pytest.mark.parametrize("way", ["minmax", "percentile", "entropy"])
def test_padding_is_not_calibrated_on(way: str, quantized: Quantized) -> None:
    alone, padded = quantized(**WAYS[way]), quantized(padding=9, **WAYS[way])
    assert alone.graph == padded.graph


def test_a_first_layer_s_grid_is_what_real_rows_make_of_the_embeddings(quantized: Quantized) -> None:
    import torch

    made = quantized(embeddings=False, **STATIC)
    model = load_model(made.source, auto_class("sequence"))
    low, high = 0.0, 0.0
    for batch in rows(8):
        with torch.inference_mode():
            states = model.bert.embeddings(torch.from_numpy(batch["input_ids"])).numpy()
        real = states[batch["attention_mask"].astype(bool)]
        low, high = min(low, float(real.min())), max(high, float(real.max()))
    assert activation_scales(made)[0] == pytest.approx((high - low) / 255, rel=1e-5)


def test_a_percentile_narrows_the_grids(quantized: Quantized) -> None:
    whole = activation_scales(quantized(**STATIC))
    most = activation_scales(quantized(**STATIC, calibration="percentile", percentile=95.0))
    assert len(whole) == len(most)
    assert sum(b < 0.9 * a for a, b in zip(whole, most, strict=True)) > LINEARS / 2


def test_it_leaves_nothing_in_the_working_directory(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, target = quantized(), tmp_path / "target"
    target.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"use": "optimum_onnx", **WAYS["percentile"]}
    BACKENDS.parse(options).quantize(QuantizationJob(made.source, target, auto_class("sequence"), made.probe, rows))
    assert list((tmp_path / "here").iterdir()) == []
    assert capsys.readouterr().out == ""


# Processors


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", ["avx2", "avx512f", "avx512_vnni"], "avx512_vnni"),
        ("x86_64", ["avx2", "avx_vnni"], "avx512_vnni"),
        ("x86_64", ["avx2", "avx512f"], "avx512"),
        ("x86_64", ["avx2"], "avx2"),
        ("aarch64", [], "arm64"),
    ],
)
def test_auto_is_the_configuration_of_this_processor(
    machine: str, flags: list[str], expected: str, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.onnxruntime import AutoQuantizationConfig

    asked: list[str] = []
    make = getattr(AutoQuantizationConfig, expected)
    monkeypatch.setattr(AutoQuantizationConfig, expected, lambda **kw: asked.append(expected) or make(**kw))
    monkeypatch.setattr(optimum_onnx.platform, "machine", lambda: machine)
    monkeypatch.setattr(optimum_onnx, "cpu_flags", lambda: flags)
    made = quantized()
    BACKENDS.parse("optimum_onnx").quantize(QuantizationJob(made.source, tmp_path, auto_class("sequence"), made.probe))
    assert set(asked) == {expected}


def test_avx2_has_unsigned_weights(quantized: Quantized) -> None:
    assert quantized(instructions="avx2").dtypes(HIDDEN, FFN) == {TensorProto.UINT8}
    assert quantized(instructions="avx512_vnni").dtypes(HIDDEN, FFN) == {TensorProto.INT8}


# What goes wrong


def test_an_export_that_differs_from_the_model_fails(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantized()
    monkeypatch.setattr("hfcompress.quantization.backends.optimum_onnx.run_onnx", lambda *given: run_onnx(*given) + 1)
    with pytest.raises(HfcompressError, match="the exported graph differs from the model"):
        BACKENDS.parse("optimum_onnx").quantize(
            QuantizationJob(made.source, tmp_path, auto_class("sequence"), made.probe)
        )
    assert list(tmp_path.iterdir()) == []


def test_what_optimum_cannot_export_is_told_with_the_way_out(tmp_path: Path) -> None:
    source = factories.save(factories.model("qwen3", head="token"), tmp_path / "float")
    job = QuantizationJob(source, tmp_path / "out", auto_class("token"), make_dummy_inputs(source))
    with pytest.raises(HfcompressError, match=r"does not know a qwen3 model with a token task head(.|\n)*onnx_int8"):
        BACKENDS.parse("optimum_onnx").quantize(job)
