"""ONNX in few bits: embedding tables in 8 and 4, linear layers in 4-bit blocks, all in half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hfcompress.measure.verify import verify
from hfcompress.models.artifact import load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import DummyInputs, logits_of, make_dummy_inputs
from hfcompress.models.linears import linears
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.export import export, quiet
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.graphs.embeddings import find_embedding_gathers, quantize_embeddings, tie_embeddings
from hfcompress.quantization.grids.blockwise import fake_quantize_blockwise, quantize_blockwise
from hfcompress.quantization.grids.rowwise import fake_quantize_rowwise
from hfcompress.utils.errors import HfcompressError
from tests import factories

AUTO = "AutoModelForSequenceClassification"
HIDDEN = 40
"""A width that no block divides."""


def batch_of(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in factories.batch(rows, length, seed).items()}


def graph_of(model: Any, folder: Path) -> onnx.ModelProto:
    with quiet():
        export(model, folder / "float.onnx", batch_of(2, 7))
    return onnx.load(folder / "float.onnx")


def logits(graph: onnx.ModelProto, folder: Path, probe: DummyInputs) -> Any:
    onnx.save(graph, folder / "made.onnx")
    return run_onnx(folder / "made.onnx", probe)


def real(answers: Any, probe: DummyInputs) -> Any:
    """Without those for padding."""
    return answers if answers.ndim == 2 else answers[probe["attention_mask"] == 1]


def tensors(graph: onnx.ModelProto) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in graph.graph.initializer}


def nibbles(packed: Any, count: int) -> Any:
    """The 4-bit numbers, 0 … 15, of each row's bytes, the lower half of a byte first."""
    flat = packed.reshape(len(packed), -1)
    return np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(packed), -1)[:, :count].astype(np.int64)


# The grids


def awkward(columns: int = 70) -> torch.Tensor:
    """Weights with a row of zeros, an outlier, ties and both signs in front."""
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    weight[3, 5] = 1e6
    weight[4] = torch.arange(columns) % 17 - 8
    weight[5] = -weight[4] / 2
    return weight


@pytest.mark.parametrize("size", [16, 32, 128])
def test_blocks_are_those_of_onnxruntime_s_own_quantizer(size: int) -> None:
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    weight = awkward()
    rows, columns = weight.shape
    blocks = -(-columns // size)
    packed, scales = np.zeros((rows, blocks, size // 2), "uint8"), np.zeros((rows, blocks), "float32")
    filled = np.ascontiguousarray(np.pad(weight.T.numpy(), ((0, blocks * size - columns), (0, 0))))
    unused = np.zeros((rows, (blocks + 1) // 2), "uint8")
    quantize_matmul_4bits(packed, filled, scales, unused, size, rows, columns, True)
    codes, steps = quantize_blockwise(weight, size)
    assert np.array_equal(codes.numpy() + 8, nibbles(packed, columns))
    assert np.array_equal(steps.numpy(), scales)


def test_four_bits_by_the_formula() -> None:
    """`w ≈ s q` with `s = m / -8`, `m` of the largest magnitude with its sign, and q in -8 … 7."""
    weight = torch.tensor([[4.0, -3.0, 0.26, 0.24, 0.0, *[-0.1] * 11]])
    expected = torch.tensor([[4.0, -3.0, 0.5, 0.0, 0.0, *[-0.0] * 11]])  # s = -0.5; 0.26 / -0.5 rounds to -1
    assert torch.equal(fake_quantize_blockwise(weight, 16), expected)
    assert torch.equal(fake_quantize_blockwise(-weight, 16), -expected)
    # The other end of the grid is one step short: 4 / -0.5 = -8 is on it, 8 is not.
    assert fake_quantize_blockwise(torch.tensor([[4.0, -4.0, *[0.0] * 14]]), 16)[
        0, :2
    ].abs().sort().values.tolist() == [3.5, 4]


def test_eight_bits_by_the_formula() -> None:
    table = torch.tensor([[127.0, -127.0, 1.4, -1.6], [0.0, 0.0, 0.0, 0.0], [0.5, 1.27, -0.004, 0.006]])
    expected = torch.tensor([[127.0, -127.0, 1.0, -2.0], [0.0] * 4, [0.5, 1.27, 0.0, 0.01]])
    assert torch.allclose(fake_quantize_rowwise(table, 8), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_costs_its_own_row_or_block_and_zeros_stay(bits: Any) -> None:
    table = awkward(64)
    found, without = fake_quantize_rowwise(table, bits), table.clone()
    without[3, 5] = 0
    assert found[3, 5] == 1e6
    assert not found[2].any()
    kept = torch.ones(table.shape, dtype=torch.bool)
    kept[3, : 64 if bits == 8 else 32] = False
    assert torch.equal(found[kept], fake_quantize_rowwise(without, bits)[kept])
    assert not found[~kept].abs().lt(1e6).logical_and(found[~kept] != 0).any()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    "rounding", [lambda w: fake_quantize_rowwise(w, 8), lambda w: fake_quantize_rowwise(w, 4), fake_quantize_blockwise]
)
def test_what_is_on_the_grid_stays_there(rounding: Callable[[Any], Any]) -> None:
    once = rounding(awkward())
    assert torch.equal(rounding(once), once)


# Embedding tables


def rounded_tables(model: Any, bits: Any) -> Any:
    """The model with its tables on their grids; a head keeps the words as they were."""
    words = model.get_input_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and "encoder.rel" not in path:  # of relative positions
            kept = module.weight.detach()
            module.weight = torch.nn.Parameter(fake_quantize_rowwise(kept, bits if module is words else 8))
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "family",
    ["bert", "mpnet", "llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("roberta", "distilbert", "electra",
     "albert", "deberta-v2", "modernbert", "qwen3"))],
)  # fmt: skip
def test_a_graph_with_rounded_tables_is_the_model_with_rounded_tables(family: str, bits: Any, tmp_path: Path) -> None:
    model = factories.model(family, hidden=HIDDEN, heads=4, seed=3)
    graph = graph_of(model, tmp_path)
    tables = find_embedding_gathers(graph)
    quantize_embeddings(graph, bits)
    found, expected = logits(graph, tmp_path, batch_of(5, 17)), logits_of(rounded_tables(model, bits), batch_of(5, 17))
    assert np.allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    kinds = {tensor.data_type for tensor in graph.graph.initializer if "embed" in tensor.name and len(tensor.dims) > 1}
    assert tables
    assert not tables.keys() & tensors(graph).keys()
    assert (TensorProto.INT4 in kinds) == (bits == 4)
    assert all("relative_attention_bias" not in name for name in tables)


def test_a_table_s_bytes_are_its_codes(tmp_path: Path) -> None:
    model = factories.model(hidden=HIDDEN)
    table = model.get_input_embeddings().weight.detach()
    name = "model.bert.embeddings.word_embeddings.weight"
    for bits in (8, 4):
        graph = graph_of(model, tmp_path)
        quantize_embeddings(graph, bits)  # type: ignore[arg-type]
        stored = tensors(graph)[f"{name}_int{bits}"]
        scales = numpy_helper.to_array(tensors(graph)[f"{name}_scales"])
        if bits == 8:
            codes, steps = np.frombuffer(stored.raw_data, "int8").reshape(table.shape), scales
        else:
            assert len(stored.raw_data) == table.numel() // 2
            signed = nibbles(np.frombuffer(stored.raw_data, "uint8").reshape(len(table), -1), HIDDEN)
            codes, steps = np.where(signed > 7, signed - 16, signed), scales.repeat(32, axis=1)[:, :HIDDEN]
        assert np.array_equal((codes * steps).astype("float32"), fake_quantize_rowwise(table, bits).numpy())  # type: ignore[arg-type]


def test_no_table_is_dequantized_whole(tmp_path: Path) -> None:
    """Nothing but a gather reads what is as long as the vocabulary."""
    for bits in (8, 4):
        graph = graph_of(factories.model(), tmp_path)
        quantize_embeddings(graph, bits)  # type: ignore[arg-type]
        long = {
            name for name, tensor in tensors(graph).items() if tensor.dims and tensor.dims[0] == len(factories.WORDS)
        }
        readers = {node.op_type for node in graph.graph.node if long & set(node.input)}
        assert len(long) == 2
        assert readers == ({"Gather"} if bits == 8 else {"GatherBlockQuantized"})


def test_a_table_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = factories.model()
    graph = graph_of(model, tmp_path)
    table = model.get_input_embeddings().weight.detach().clone()
    table[3, 1], table[7, 0] = float("nan"), float("inf")
    tensors(graph)["model.bert.embeddings.word_embeddings.weight"].raw_data = table.numpy().tobytes()
    with pytest.raises(HfcompressError, match=r"2 of the 23 rows of .*word_embeddings.weight .* not finite"):
        quantize_embeddings(graph, 8)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_words_that_a_mask_head_multiplies_with_are_stored_once(family: str, tmp_path: Path) -> None:
    model = factories.model(family, head="mask")
    graph = graph_of(model, tmp_path)

    def copies() -> int:
        sides = {len(factories.WORDS), 32}
        return sum(set(t.dims) == sides and t.data_type == TensorProto.FLOAT for t in graph.graph.initializer)

    assert copies() == 2
    tie_embeddings(graph)
    assert copies() == 1
    probe = batch_of(3, 9)
    assert np.allclose(logits(graph, tmp_path, probe), logits_of(model, probe), atol=1e-4)


# Backends


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Quantizes a tiny model of uneven layers, once for equal arguments: its work and the logits."""

    @cache
    def source(family: str, head: str) -> Path:
        path = tmp_path_factory.mktemp("float")
        model = factories.model(family, hidden=64, heads=4, ffn=100, head=head)
        if head == "sequence" and family == "bert":
            model = cut(model, [Keep((1, 3), tuple(range(77))), Keep((0, 1, 2), tuple(range(0, 100, 3)))])
        save_model(model, factories.tokenizer(), path)
        return path

    @cache
    def make(name: str, family: str = "bert", head: str = "sequence", keep: Any = (), **options: Any) -> Any:
        from hfcompress.models.architectures import TASK_HEADS

        origin, target = source(family, head), tmp_path_factory.mktemp(name)
        auto_class = f"AutoModel{TASK_HEADS[head]}"
        job = QuantizationJob(origin, target, auto_class, make_dummy_inputs(origin), keep=frozenset(keep))
        return job, BACKENDS.parse({"use": name, **options}).quantize(job).logits

    return make


def graph_in(job: QuantizationJob) -> onnx.ModelProto:
    return onnx.load(graph_file(job))


def graph_file(job: QuantizationJob) -> Path:
    (found,) = (job.target / "onnx").iterdir()
    return found


def rounded_linears(job: QuantizationJob, size: int, keep: Any = ()) -> Any:
    model = load_model(job.source, job.auto_class)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path not in keep:
            module.weight = torch.nn.Parameter(fake_quantize_blockwise(module.weight.detach(), size))
    return model


@pytest.mark.parametrize("size", [16, 32, 64])
def test_int4_answers_as_the_model_with_rounded_weights(size: int, made: Callable[..., Any]) -> None:
    job, found = made("onnx_int4", block_size=size, compute="float32", embedding_bits=8)
    expected = logits_of(rounded_tables(rounded_linears(job, size), 8), job.dummy_inputs)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(found - logits_of(load_model(job.source, AUTO), job.dummy_inputs)).max() > 1e-3


def test_what_int4_stores_is_rounded_of_the_weights(made: Callable[..., Any]) -> None:
    """`scale (q - 8)` of the file's own bytes, block by block."""
    job, _ = made("onnx_int4")
    graph, model = graph_in(job), load_model(job.source, AUTO)
    stored = tensors(graph)
    path = "bert.encoder.layer.0.output.dense"
    node = next(node for node in graph.graph.node if path in node.name and node.op_type == "MatMulNBits")
    packed, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
    assert packed.shape == (64, 3, 16)  # 77 inputs in blocks of 32, two in a byte
    steps = scales.reshape(64, 3).repeat(32, axis=1)[:, :77]
    weight = model.get_submodule(path).weight.detach()
    found = ((nibbles(packed, 77) - 8) * steps).astype("float32")
    assert np.array_equal(found, BACKENDS.parse("onnx_int4").fake_quantize(weight).numpy())
    assert 0 < np.abs(found - weight.numpy()).max() <= np.abs(scales).max()


def test_int8_products_are_near_those_of_floats(made: Callable[..., Any]) -> None:
    job, whole = made("onnx_int4", compute="int8")
    _, floats = made("onnx_int4", compute="float32")
    levels = {a.i for node in graph_in(job).graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}
    assert 0 < np.abs(whole - floats).max() <= 0.05 * np.abs(floats).max()


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "mask"), ("llama", "causal"), ("albert", "sequence"),
     *(pytest.param(*x, marks=pytest.mark.slow) for x in factories.headed() if x[0] in ("bert", "mpnet", "deberta-v2",
       "modernbert", "qwen3"))],
)  # fmt: skip
def test_every_linear_layer_of_any_model_is_in_4_bits(family: str, head: str, made: Callable[..., Any]) -> None:
    job, found = made("onnx_int4", family, head, compute="float32", embeddings=False)
    found, expected = (
        real(x, job.dummy_inputs) for x in (found, logits_of(rounded_linears(job, 32), job.dummy_inputs))
    )
    assert np.allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    floats = [t for t in graph_in(job).graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert all("embed" in tensor.name or "relative" in tensor.name for tensor in floats)
    assert len({t.name for t in graph_in(job).graph.initializer}) == len(graph_in(job).graph.initializer)


def test_kept_layers_stay_floats(made: Callable[..., Any]) -> None:
    keep = ("bert.encoder.layer.1.attention.output.dense", "classifier")
    job, found = made("onnx_int4", keep=keep, compute="float32", embeddings=False)
    floats = {node.name for node in graph_in(job).graph.node if node.op_type == "MatMul" and "linear:" in node.name}
    assert floats == {f"linear:{path}" for path in keep}
    expected = logits_of(rounded_linears(job, 32, keep), job.dummy_inputs)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_weight_that_is_nan_is_refused_by_name(tmp_path: Path) -> None:
    model = factories.model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[4, 2] = float("inf")
    backend = BACKENDS.parse("onnx_int4")
    with pytest.raises(HfcompressError, match=r"layer.1.output.dense has weights that are NaN or infinite"):
        backend.find_odd_weights(linears(model), QuantizationJob(tmp_path, tmp_path, AUTO, {}))


def test_channels_of_zeros_are_noted(tmp_path: Path) -> None:
    model, job = factories.model(), QuantizationJob(tmp_path, tmp_path, AUTO, {})
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[4:6] = 0
    found = BACKENDS.parse("onnx_int4").find_odd_weights(linears(model), job)
    assert found == (OddWeights("bert.encoder.layer.1.output.dense", "zeros", 2),)


def test_training_feels_what_int4_stores(made: Callable[..., Any]) -> None:
    job, _ = made("onnx_int4", compute="float32")
    model = load_model(job.source, AUTO)
    backend = BACKENDS.parse({"use": "onnx_int4", "compute": "float32"})
    masks = backend.training_overlay(model, job, "ema", 0.5).eval()
    with masks.lay_over(model, 1.0):
        felt = logits_of(model, job.dummy_inputs)
    _, stored = made("onnx_int4", compute="float32")
    assert np.allclose(felt, stored, atol=1e-4 * np.abs(stored).max())


def test_an_option_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(Exception, match="`embedding_bits` is for `embeddings: true`"):
        BACKENDS.parse({"use": "onnx_int4", "embeddings": False, "embedding_bits": 8})


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "sequence"), ("bert", "mask"), ("mpnet", "token"),
     *(pytest.param(*x, marks=pytest.mark.slow) for x in factories.headed())],
)  # fmt: skip
def test_half_precision_answers_like_the_float_model(family: str, head: str, made: Callable[..., Any]) -> None:
    job, found = made("onnx_fp16", family, head)
    expected = real(logits_of(load_model(job.source, job.auto_class), job.dummy_inputs), job.dummy_inputs)
    found = real(found, job.dummy_inputs)
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()
    graph = graph_in(job)
    floats = [t.name for t in graph.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert floats == []
    words = [t for t in graph.graph.initializer if len(factories.WORDS) in t.dims and len(t.dims) > 1]
    assert len(words) == 1 or head == "causal"  # nobody ties the words of these decoders


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_half_precision_refuses_weights_that_it_has_no_room_for(value: float) -> None:
    from hfcompress.quantization.backends.onnx_fp16 import require_float16_range

    model = factories.model()
    require_float16_range(model)
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = value
    with pytest.raises(HfcompressError, match=r"pooler.dense.weight has 1 values .* beyond float16's 65504"):
        require_float16_range(model)


@pytest.mark.parametrize("name", ["onnx_int4", "onnx_fp16"])
def test_batches_and_lengths_never_seen_and_padding(name: str, made: Callable[..., Any]) -> None:
    job, _ = made(name)
    graph, model = graph_file(job), load_model(job.source, AUTO)
    for rows, length in ((1, 3), (1, 37), (7, 11)):
        probe = batch_of(rows, length)
        found, expected = run_onnx(graph, probe), logits_of(model, probe)
        assert np.abs(found - expected).max() <= 0.3 * np.abs(expected).max()
        for row, real in enumerate(probe["attention_mask"].sum(1)):
            alone = run_onnx(graph, {key: value[row : row + 1, :real] for key, value in probe.items()})
            assert np.abs(alone[0] - found[row]).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "dtype"), [("onnx_int4", "int4"), ("onnx_fp16", "float16")])
def test_the_directory_tells_its_dtype_and_answers_the_same_in_a_fresh_process(
    name: str, dtype: str, made: Callable[..., Any]
) -> None:
    job, found = made(name)
    factories.tokenizer().save_pretrained(job.target)
    artifact = open_artifact(job.target)
    assert (artifact.dtype, artifact.runtime) == (dtype, "onnx")
    verify(artifact, found, AUTO)


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [("onnx_int4", {"embedding_bits": 8}, "int4"), ("onnx_int8", {"embedding_bits": 4}, "int8"),
     ("onnx_int8", {"embeddings": False}, "int8"), ("onnx_int4", {"embeddings": False}, "int4")],
)  # fmt: skip
def test_the_dtype_is_that_of_the_linear_layers(
    name: str, options: dict[str, Any], dtype: str, made: Callable[..., Any]
) -> None:
    job, _ = made(name, **options)
    assert open_artifact(job.target).dtype == dtype


@pytest.mark.parametrize(
    ("name", "options"),
    [("onnx_fp16", {}), ("onnx_int4", {}), ("onnx_int4", {"embedding_bits": 8}), ("onnx_int4", {"block_size": 128})],
)
def test_the_plan_s_bytes_are_those_of_the_tensors(name: str, options: Any, tmp_path: Path) -> None:
    words = [*factories.WORDS, *(f"word{i}" for i in range(2000))]
    model = factories.model(hidden=128, ffn=512, vocab_size=len(words))
    save_model(model, factories.tokenizer(words), tmp_path / "float")
    source = open_artifact(tmp_path / "float")
    (tmp_path / "out").mkdir()
    backend = BACKENDS.parse({"use": name, **options})
    job = QuantizationJob(source.path, tmp_path / "out", AUTO, make_dummy_inputs(source.path))
    backend.quantize(job)
    assert source.shape is not None
    graph = graph_in(job)
    stored = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    assert stored == pytest.approx(backend.plan(source.shape).bytes, rel=0.05)
