"""onnx_int8: what its graphs store, that they compute what they promise, and how they are calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from pydantic import ValidationError
from scipy.stats import entropy

from hfcompress.measure.verify import verify
from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import load_model, open_artifact, read_config, save_model
from hfcompress.models.dummy_inputs import DummyInputs, logits_of, make_dummy_inputs
from hfcompress.models.forward import select_inputs
from hfcompress.models.linears import linears
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx import export
from hfcompress.onnx.fuse import paths_of
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob, QuantizedModel
from hfcompress.quantization.backends.onnx_int8 import OnnxInt8
from hfcompress.quantization.calibration import calibrate
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import HfcompressError
from tests import factories

AUTO = "AutoModelForSequenceClassification"
WIDTH, FFN = 64, 128
UNEVEN = [Keep((1, 3), tuple(range(96))), Keep((0, 1, 2, 3), tuple(range(0, 128, 2)))]
MODES = ("dynamic", "static")
FAMILIES = ("bert", "distilbert", "roberta")
NEAR = 0.15
"""Of the largest logit: how far int8 may move an answer of these random models."""


def batch_of(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in factories.batch(rows, length, seed).items()}


ROWS = [batch_of(8, 30, seed=7), batch_of(8, 14, seed=8), batch_of(3, 37, seed=9)]


@dataclass(frozen=True)
class Made:
    path: Path
    job: QuantizationJob
    model: Any
    quantized: QuantizedModel

    @property
    def logits(self) -> Any:
        return self.quantized.logits

    @property
    def graph(self) -> Any:
        return onnx.load(self.path / "onnx" / "model_quantized.onnx")

    def run(self, probe: DummyInputs) -> Any:
        return run_onnx(self.path / "onnx" / "model_quantized.onnx", probe)

    def plain(self, probe: DummyInputs) -> Any:
        return logits_of(self.model, probe)


Quantized = Callable[..., Made]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def source(family: str, head: str, layout: str) -> Path:
        path = tmp_path_factory.mktemp("float")
        model = factories.model(family, hidden=WIDTH, ffn=FFN, head=head)
        save_model(cut(model, UNEVEN) if layout == "uneven" else model, factories.tokenizer(), path)
        return path

    @cache
    def make(family: str = "bert", head: str = "sequence", layout: str = "stock", **options: Any) -> Made:
        origin, auto = source(family, head, layout), "AutoModel" + TASK_HEADS[head]
        return quantize(origin, tmp_path_factory.mktemp("int8"), auto, **options)

    return make


def quantize(
    source: Path, target: Path, auto: str = AUTO, changes: dict[str, Any] | None = None, **options: Any
) -> Made:
    job = QuantizationJob(source, target, auto, make_dummy_inputs(source), rows=lambda _: ROWS, **changes or {})
    made = BACKENDS.parse({"use": "onnx_int8", **options}).quantize(job)
    return Made(target, job, load_model(source, auto), made)


def relative(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def initializers(graph: Any) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def optimized(path: Path, tmp_path: Path) -> list[Any]:
    """The nodes that ONNX Runtime makes of a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(
        str(path / "onnx" / "model_quantized.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return list(onnx.load(tmp_path / "optimized.onnx").graph.node)


# What is stored


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["stock", "uneven"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_matrix_is_left_in_float(family: str, layout: str, mode: str, quantized: Quantized) -> None:
    made = quantized(family, layout=layout, mode=mode)
    values = initializers(made.graph)
    big = {name: value.dtype for name, value in values.items() if value.ndim > 1 and value.size > 64}
    assert {name for name, dtype in big.items() if dtype not in (np.int8, np.uint8, np.int64)} == {
        name for name in big if name.endswith("_scales")
    }
    weights = sum(layer.weight.numel() for layer in linears(made.model).values())
    tables = sum(m.weight.numel() for m in made.model.modules() if isinstance(m, torch.nn.Embedding))
    assert sum(value.size for value in values.values() if value.dtype == np.int8 and value.ndim > 1) >= weights + tables


@pytest.mark.parametrize("mode", MODES)
def test_a_step_a_channel_or_one_a_matrix(mode: str, quantized: Quantized) -> None:
    def sizes(**options: Any) -> list[int]:
        values = initializers(quantized(mode=mode, **options).graph)
        return [
            value.size
            for name, value in values.items()
            if name.endswith("scale") and "intermediate" in name and "weight" in name
        ]

    assert sizes() == [FFN, FFN]
    assert sizes(per_channel=False) == [1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_reduce_range_leaves_weights_of_7_bits(mode: str, quantized: Quantized) -> None:
    def largest(**options: Any) -> int:
        values = initializers(quantized(mode=mode, embeddings=False, **options).graph).values()
        return max(int(np.abs(v.astype(int)).max()) for v in values if v.dtype == np.int8 and v.ndim == 2)

    assert (largest(), largest(reduce_range=True)) == (127, 64)
    made = quantized(mode=mode, embeddings=False, reduce_range=True)
    assert 0 < relative(made.logits, made.plain(made.job.dummy_inputs)) < 2 * NEAR


def test_embeddings_can_stay_in_float_or_have_4_bits(quantized: Quantized) -> None:
    def words(**options: Any) -> set[int]:
        graph = quantized(**options).graph.graph
        return {t.data_type for t in graph.initializer if tuple(t.dims) == (len(factories.WORDS), WIDTH)}

    assert words() == {TensorProto.INT8}
    assert words(embeddings=False) == {TensorProto.FLOAT}
    assert words(embedding_bits=4) == {TensorProto.INT4}


@pytest.mark.parametrize("mode", MODES)
def test_layers_to_keep_stay_in_float(mode: str, quantized: Quantized, tmp_path: Path) -> None:
    kept = ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.attention.self.key", "classifier"]
    source = quantized().job.source
    made = quantize(source, tmp_path, changes={"keep": frozenset(kept)}, mode=mode)
    weights = {tensor.name: tensor.data_type for tensor in made.graph.graph.initializer}
    float_nodes = {
        path
        for node in made.graph.graph.node
        if node.op_type == "MatMul" and weights.get(node.input[1]) == TensorProto.FLOAT
        for path in paths_of(node)
    }
    own = "bert.encoder.layer.1.attention.self"
    assert float_nodes == {*kept, f"{own}.query", f"{own}.value"}


# What is computed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["stock", "uneven"])
def test_batches_and_lengths_never_seen_at_export(layout: str, mode: str, quantized: Quantized) -> None:
    made = quantized(layout=layout, mode=mode)
    for rows, length in ((1, 3), (1, 37), (7, 11)):
        probe = batch_of(rows, length)
        found, expected = made.run(probe), made.plain(probe)
        assert found.shape == (rows, 2)
        assert 0 < relative(found, expected) <= NEAR


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["token", "span", "mask"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_every_head(family: str, head: str, mode: str, quantized: Quantized) -> None:
    made = quantized(family, head, mode=mode)
    probe = batch_of(3, 17)
    seen = probe["attention_mask"].astype(bool)
    found, expected = made.run(probe), made.plain(probe)
    assert found.shape == expected.shape
    assert 0 < relative(found[seen], expected[seen]) <= NEAR


def literal(model: Any, ranges: Ranges, steps: dict[str, Any], probe: DummyInputs) -> Any:
    """The logits of a model whose linear layers multiply what Jacob et al. (2018) write, in whole numbers."""

    def run(path: str, layer: Any) -> Any:
        low, high = ranges.inputs[path]
        scale = (max(high, 0) - min(low, 0)) / 255
        zero = round(-min(low, 0) / scale)

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            levels = torch.clamp(torch.round(inputs.double() / scale) + zero, 0, 255) - zero
            weight = torch.clamp(torch.round(layer.weight.double() / steps[path][:, None]), -127, 127)
            sums = levels @ weight.T
            return (sums * scale * steps[path] + (0 if layer.bias is None else layer.bias)).float()

        return forward

    layers = linears(model)
    for path, layer in layers.items():
        layer.forward = run(path, layer)
    try:
        return logits_of(model, probe)
    finally:
        for layer in layers.values():
            del layer.forward


def one_step(model: Any, ranges: Ranges) -> float:
    """What one step of an input moves a layer's output by, at most: kernels sum in other orders, and a value that lies
    between two steps may round to the other.
    """
    layers = linears(model)
    widths = {path: (high - low) / 255 for path, (low, high) in ranges.inputs.items()}
    return max(width * float(layers[path].weight.detach().abs().max()) for path, width in widths.items())


SIMULATED = [
    *((family, "stock") for family in FAMILIES),
    ("bert", "uneven"),
    ("albert", "stock"),  # one layer's weights, read on one grid wherever it runs
    *(pytest.param(family, "uneven", marks=pytest.mark.slow) for family in ("distilbert", "roberta")),
    *(pytest.param(family, "stock", marks=pytest.mark.slow) for family in ("electra", "mpnet", "deberta-v2")),
    pytest.param("modernbert", "stock", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "layout"), SIMULATED)
def test_static_is_the_simulated_model_within_a_step(family: str, layout: str, quantized: Quantized) -> None:
    made = quantized(family, layout=layout, mode="static", embeddings=False)
    ranges = calibrate(made.model, ROWS, "minmax")
    steps = {path: layer.weight.detach().abs().amax(1) / 127 for path, layer in linears(made.model).items()}
    probe = batch_of(6, 21)
    differences = np.abs(made.run(probe) - literal(made.model, ranges, steps, probe)).max(1)
    assert differences.max() <= one_step(made.model, ranges)
    assert differences.min() < 1e-4  # a row in which no value lies between two steps


def test_trained_ranges_and_steps_are_what_is_stored(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized().job.source
    model = load_model(source, AUTO)
    ranges = calibrate(model, ROWS, "minmax")
    trained = Ranges(
        {path: (0.7 * low, 0.8 * high) for path, (low, high) in ranges.inputs.items()},
        {path: layer.weight.detach().abs().amax(1) / 100 for path, layer in linears(model).items()},
    )

    def never(_: int) -> Any:
        raise AssertionError("there is nothing to calibrate")

    job = QuantizationJob(source, tmp_path, AUTO, make_dummy_inputs(source), rows=never, ranges=trained)
    backend = BACKENDS.parse({"use": "onnx_int8", "mode": "static", "embeddings": False})
    found = backend.quantize(job).logits
    assert np.abs(found - literal(model, trained, dict(trained.scales), job.dummy_inputs)).max() <= one_step(
        model, trained
    )
    with backend.simulate(model, list(linears(model)), job):
        assert np.abs(found - logits_of(model, job.dummy_inputs)).max() <= one_step(model, trained)


@pytest.mark.parametrize("mode", MODES)
def test_simulated_layers_answer_as_the_graph_does(mode: str, quantized: Quantized) -> None:
    made = quantized(mode=mode, embeddings=False)
    backend = BACKENDS.parse({"use": "onnx_int8", "mode": mode, "embeddings": False})
    probe, plain = made.job.dummy_inputs, made.plain(made.job.dummy_inputs)
    with backend.simulate(made.model, list(linears(made.model)), made.job):
        simulated = logits_of(made.model, probe)
    assert np.abs(simulated - made.logits).max() < 0.1 * np.abs(plain - made.logits).max()
    assert np.array_equal(logits_of(made.model, probe), plain)
    with backend.simulate(made.model, ["classifier"], made.job):
        one = np.abs(logits_of(made.model, probe) - plain).max()
    assert 0 < one < np.abs(plain - made.logits).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_moves_no_static_answer(family: str, quantized: Quantized) -> None:
    made, probe = quantized(family, mode="static"), batch_of(4, 20)
    together = made.run(probe)
    for row, length in enumerate(probe["attention_mask"].sum(1)):
        alone = made.run({name: value[row : row + 1, :length] for name, value in probe.items()})
        assert np.abs(alone[0] - together[row]).max() < 1e-5


def test_padding_moves_a_dynamic_answer_by_no_more_than_rounding(quantized: Quantized) -> None:
    """A dynamic grid spans the whole batch, padding included: a row alone gets another grid, so other roundings."""
    made, probe = quantized(mode="dynamic"), batch_of(4, 20)
    together, largest = made.run(probe), np.abs(made.plain(probe)).max()
    for row, length in enumerate(probe["attention_mask"].sum(1)):
        alone = made.run({name: value[row : row + 1, :length] for name, value in probe.items()})
        assert np.abs(alone[0] - together[row]).max() <= NEAR / 2 * largest


@pytest.mark.parametrize("mode", MODES)
def test_the_products_run_in_integers(mode: str, quantized: Quantized, tmp_path: Path) -> None:
    nodes = optimized(quantized(mode=mode).path, tmp_path)
    kinds = [node.op_type for node in nodes]
    fused = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm"}
    assert sum(kind in fused for kind in kinds) == 2 * 4 + 2  # queries, keys and values are one; pooler, classifier
    assert not {"MatMul", "Gemm", "FusedGemm", "MatMulInteger", "DequantizeLinear"} & set(kinds)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_answers_the_same_in_a_fresh_process(mode: str, quantized: Quantized) -> None:
    made = quantized(layout="uneven", mode=mode)
    factories.tokenizer().save_pretrained(made.path)
    assert set(verify(open_artifact(made.path), made.logits, AUTO)) == {"onnx"}


@pytest.mark.parametrize(("family", "inputs"), [("bert", 3), ("distilbert", 2), ("roberta", 3)])
def test_token_types_that_a_tokenizer_leaves_out_are_zeros(family: str, inputs: int, quantized: Quantized) -> None:
    made = quantized(family)
    assert len(made.graph.graph.input) == inputs
    without = batch_of(2, 6)
    assert np.array_equal(
        made.run(without), made.run({**without, "token_type_ids": np.zeros_like(without["input_ids"])})
    )


def test_the_token_types_of_a_pair_count(quantized: Quantized) -> None:
    made, pair = quantized(), {**batch_of(1, 6), "token_type_ids": np.array([[0, 0, 0, 1, 1, 1]])}
    assert relative(made.run(pair), made.run(batch_of(1, 6))) > 0.01


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_an_export_that_differs_from_the_model_fails(
    wrong: float, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantized().job.source
    monkeypatch.setattr(export, "run_onnx", lambda path, probe: run_onnx(path, probe) + wrong)
    with pytest.raises(HfcompressError, match="the exported graph differs from the model"):
        quantize(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_config_beside_a_graph_asks_for_no_remote_code(quantized: Quantized) -> None:
    config = read_config(quantized(layout="uneven").path)
    assert "auto_map" not in config
    assert shape_of(config).layers[0].heads == 2


# Odd weights


def odd_model(tmp_path: Path, change: Callable[[Any], None]) -> Path:
    model = factories.model(hidden=WIDTH, ffn=FFN)
    with torch.no_grad():
        change(model)
    return factories.save(model, tmp_path / "odd")


@pytest.mark.parametrize("mode", MODES)
def test_an_outlier_and_a_channel_of_zeros_are_told(mode: str, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.bert.encoder.layer[0].output.dense.weight[3, 5] = 1e6
        model.bert.encoder.layer[1].intermediate.dense.weight[[2, 7]] = 0
        model.bert.pooler.dense.weight[4] = 0
        model.classifier.weight[1] = 1e-12

    source = odd_model(tmp_path, change)
    (tmp_path / "out").mkdir()
    made = quantize(source, tmp_path / "out", mode=mode)
    assert made.quantized.odd_weights == (
        OddWeights("bert.encoder.layer.0.output.dense", "outlier", 1),
        OddWeights("bert.encoder.layer.1.intermediate.dense", "zeros", 2),
        OddWeights("bert.pooler.dense", "zeros", 1),
    )
    assert relative(made.logits, made.plain(made.job.dummy_inputs)) < NEAR


def test_an_outlier_under_one_step_a_matrix_costs_the_matrix(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.bert.encoder.layer[0].output.dense.weight[3, 5] = 1e6

    source = odd_model(tmp_path, change)
    (tmp_path / "out").mkdir()
    made = quantize(source, tmp_path / "out", per_channel=False)
    assert made.quantized.odd_weights == (OddWeights("bert.encoder.layer.0.output.dense", "outlier", WIDTH),)


def test_ordinary_weights_are_not_odd(quantized: Quantized) -> None:
    assert quantized().quantized.odd_weights == ()


@pytest.mark.parametrize(("mode", "value"), [("dynamic", math.nan), ("static", math.inf)])
def test_weights_that_are_not_finite_name_their_layer(mode: str, value: float, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.bert.encoder.layer[1].intermediate.dense.weight[3, 5] = value

    source = odd_model(tmp_path, change)
    message = r"encoder\.layer\.1\.intermediate\.dense has weights that are NaN or infinite, in 1 of its 128"
    with pytest.raises(HfcompressError, match=message):
        quantize(source, tmp_path, mode=mode)


# Calibration


def seen_inputs(model: Any, batches: list[Any]) -> dict[str, Any]:
    """All that each linear layer reads of real tokens, flat."""
    seen: dict[str, list[Any]] = {path: [] for path in linears(model)}
    for batch in batches:
        mask = torch.from_numpy(batch["attention_mask"]).bool()

        def hook(path: str, mask: Any = mask) -> Any:
            return lambda _, inputs: seen[path].append(
                (inputs[0][mask] if inputs[0].dim() == 3 else inputs[0]).flatten()
            )

        handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in linears(model).items()]
        with torch.no_grad():
            model(**select_inputs(model, {name: torch.from_numpy(value) for name, value in batch.items()}))
        for handle in handles:
            handle.remove()
    return {path: torch.cat(values) for path, values in seen.items()}


def test_minmax_is_all_that_was_seen() -> None:
    model = factories.model()
    found = calibrate(model, ROWS, "minmax").inputs
    expected = seen_inputs(model, ROWS)
    assert set(found) == set(expected)
    for path, values in expected.items():
        assert found[path] == pytest.approx((min(float(values.min()), 0), max(float(values.max()), 0)), rel=1e-5)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
def test_percentile_cuts_as_much_at_both_ends(percentile: float) -> None:
    model = factories.model()
    found = calibrate(model, ROWS, "percentile", percentile).inputs
    for path, values in seen_inputs(model, ROWS).items():
        width = (max(float(values.max()), 0) - min(float(values.min()), 0)) / 2048
        tail = (100 - percentile) / 2
        low, high = np.percentile(values.numpy(), [tail, 100 - tail], method="inverted_cdf")
        assert min(low, 0) - 1.01 * width <= found[path][0] <= min(low, 0) + 1e-4
        assert max(high, 0) - 1e-4 <= found[path][1] <= max(high, 0) + 1.01 * width


def literal_threshold(values: Any) -> float:
    """Pages 26 to 38 of Migacz's slides, threshold by threshold, with SciPy's divergence."""
    sizes = values.abs()
    counts = sizes.histc(2048, 0, float(sizes.max())).numpy()

    def divergence(kept: int) -> float:
        reference = np.append(counts[: kept - 1], counts[kept - 1 :].sum())
        starts = np.arange(128) * kept // 128
        filled = counts[:kept] > 0
        levels = np.add.reduceat(counts[:kept], starts) / np.maximum(np.add.reduceat(filled, starts, dtype=int), 1)
        told = levels.repeat(np.diff(starts, append=kept)) * filled
        return float(entropy(reference, told))

    return min(range(128, 2049), key=divergence) / 2048 * float(sizes.max())


def test_entropy_is_the_threshold_of_least_divergence() -> None:
    model = factories.model(layers=1)
    found = calibrate(model, ROWS, "entropy").inputs
    everything = seen_inputs(model, ROWS)
    values = everything["bert.encoder.layer.0.output.dense"]
    threshold = literal_threshold(values)
    expected = max(float(values.min()), -threshold), min(float(values.max()), threshold)
    assert found["bert.encoder.layer.0.output.dense"] == pytest.approx(expected, rel=1e-6)
    assert any(found[path][1] < float(values.max()) for path, values in everything.items())


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_padding_counts_in_no_statistic(method: Any) -> None:
    model, batch = factories.model(layers=1), batch_of(6, 25)
    junk = {**batch, "input_ids": np.where(batch["attention_mask"] == 1, batch["input_ids"], 6)}
    more = {name: np.pad(value, ((0, 0), (0, 12))) for name, value in batch.items()}
    plain = calibrate(model, [batch], method, 99.0).inputs
    assert calibrate(model, [junk], method, 99.0).inputs == plain
    padded = calibrate(model, [more], method, 99.0).inputs
    for path, (low, high) in plain.items():
        assert padded[path] == pytest.approx((low, high), abs=2e-3 * (high - low) if method != "minmax" else 1e-5)


def test_a_model_that_overflows_names_the_layer_and_no_rows_are_told() -> None:
    model = factories.model()
    with pytest.raises(HfcompressError, match="no rows to calibrate on"):
        calibrate(model, [], "minmax")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[0] = math.inf
    with pytest.raises(HfcompressError, match=r"the input of bert\.encoder\.layer\.1\.attention\.self\.query is not"):
        calibrate(model, ROWS, "minmax")


def test_calibration_reads_as_many_rows_as_it_is_told_and_once(quantized: Quantized, tmp_path: Path) -> None:
    asked: list[int] = []

    def rows(count: int) -> Any:
        asked.append(count)
        return ROWS

    backend = BACKENDS.parse({"use": "onnx_int8", "mode": "static", "rows": 19})
    job = replace(quantized().job, target=tmp_path, rows=rows)
    job = replace(job, ranges=backend.calibrate(job))
    model = load_model(job.source, AUTO)
    for path in ("classifier", "bert.pooler.dense"):
        with backend.simulate(model, [path], job):
            pass
    backend.quantize(job)
    assert asked == [19]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "entropy"}, "`calibration` is for `mode: static`; leave it out"),
        ({"rows": 8}, "`rows` is for `mode: static`; leave it out"),
        ({"mode": "static", "percentile": 99.0}, "`percentile` is for `calibration: percentile`; leave it out"),
        ({"embeddings": False, "embedding_bits": 4}, "`embedding_bits` is for `embeddings: true`; leave it out"),
        ({"mode": "weights"}, "'dynamic' or 'static'"),
    ],
)
def test_what_would_change_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        OnnxInt8.model_validate(options)


@pytest.mark.parametrize(
    ("options", "ranges", "kind"),
    [
        ({}, "ema", "FakeQuantization"),
        ({"mode": "static"}, "ema", "MovingAverageRanges"),
        ({"mode": "static"}, "learned", "LearnedStepSizes"),
    ],
)
def test_training_is_of_the_grids_that_are_stored(
    options: dict[str, Any], ranges: Any, kind: str, quantized: Quantized
) -> None:
    backend, made = OnnxInt8.model_validate(options), quantized()
    masks = backend.training_overlay(made.model, made.job, ranges, 0.5)
    assert type(masks).__name__ == kind
    found = masks.ranges()
    expected = calibrate(made.model, ROWS, "minmax").inputs if options else None
    assert (found is None) == (expected is None)
    for path, bounds in (expected or {}).items():
        assert found is not None
        assert found.inputs[path] == pytest.approx(bounds, rel=0.01, abs=0.01)
