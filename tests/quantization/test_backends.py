"""Each backend on stock and uneven models: what is stored, what it answers, and that it reloads anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from hfcompress.measure.verify import verify
from hfcompress.models.artifact import MODELING_FILE, load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import DummyInputs, logits_of, make_dummy_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.utils.errors import HfcompressError
from tests import factories

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Exporting aten"),
]

AUTO = "AutoModelForSequenceClassification"
FAMILIES = ("bert", "distilbert", "roberta")
# Widths that 4-bit blocks of 64 divide.
LAYOUTS = {
    "stock": [Keep((0, 1, 2, 3), tuple(range(256)))] * 2,
    "uneven": [Keep((1, 3), tuple(range(192))), Keep((0, 1, 2, 3), tuple(range(0, 256, 4)))],
}


@dataclass(frozen=True)
class Expected:
    """What is known of a backend.

    Attributes:
        dtype: What its directory says that it holds.
        runtime: What runs it.
        near: Of the largest logit, how far its rounding may move an answer of these random models.
        layouts: What of `LAYOUTS` it takes.
        exact: Whether a fresh process answers to the bit.
    """

    dtype: str
    runtime: str = "torch"
    near: float = 0.15
    layouts: tuple[str, ...] = ("stock", "uneven")
    exact: bool = True


EXPECTED = {
    "float16": Expected("float16", near=0.01),
    "bfloat16": Expected("bfloat16", near=0.05),
    "bnb_8bit": Expected("int8"),
    "bnb_4bit": Expected("nf4", near=0.4),
    "torch_int8": Expected("int8"),
    "torchao_int8": Expected("int8", near=0.5),  # PyTorch's int8 products overflow on processors without VNNI
    "torchao_int8_weight_only": Expected("int8"),
    "torchao_int4": Expected("int4", near=0.4),
    "onnx_int8": Expected("int8", "onnx", exact=False),
    "onnx_int4": Expected("int4", "onnx", near=0.4, exact=False),
    "onnx_fp16": Expected("float16", "onnx", near=0.01, exact=False),
}
"""The backends that run on a CPU, in the environment of one of the two locks; others have tests of their own."""
ELSEWHERE = {"optimum_onnx", "openvino", "openvino_int8", "gptq"}
HERE = [name for name in EXPECTED if BACKENDS.get(name)().unavailable() is None]
QUICK = {
    ("float16", "uneven"),
    ("bnb_8bit", "uneven"),
    ("bnb_4bit", "uneven"),
    ("onnx_int8", "uneven"),
    ("torch_int8", "stock"),
}
# Together they take long: each starts a process that imports torch and transformers.
FRESH_PROCESS = [
    pytest.param(name, layout, marks=[] if (name, layout) in QUICK else [pytest.mark.slow])
    for name in HERE
    for layout in LAYOUTS
]


@dataclass(frozen=True)
class Made:
    path: Path
    source: Path
    probe: DummyInputs
    plain: Any
    """Logits of the float model on the probe."""
    logits: Any
    """What `quantize` returned."""


Quantized = Callable[..., Made]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def source(family: str, layout: str, hidden: int) -> Path:
        path = tmp_path_factory.mktemp("float")
        model = factories.model(family, hidden=hidden, heads=4, ffn=2 * hidden)
        save_model(model if hidden != 128 else cut(model, LAYOUTS[layout]), factories.tokenizer(), path)
        return path

    @cache
    def make(name: str, family: str = "bert", layout: str = "stock", hidden: int = 128, **options: Any) -> Made:
        origin, target = source(family, layout, hidden), tmp_path_factory.mktemp(name)
        probe = make_dummy_inputs(origin)
        logits = BACKENDS.parse({"use": name, **options}).quantize(QuantizationJob(origin, target, AUTO, probe)).logits
        factories.tokenizer().save_pretrained(target)
        return Made(target, origin, probe, logits_of(load_model(origin, AUTO), probe), logits)

    return make


def stored(path: Path) -> dict[str, str]:
    """The dtype of each tensor in a directory's safetensors."""
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping


def relative(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# All backends


def test_every_backend_has_tests() -> None:
    assert {*EXPECTED, *ELSEWHERE} == {*BACKENDS.names()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HERE)
def test_the_quantized_model_answers_like_the_float_one(name: str, layout: str, quantized: Quantized) -> None:
    made = quantized(name, layout=layout)
    assert 0 < relative(made.logits, made.plain) <= EXPECTED[name].near


@pytest.mark.parametrize(("name", "layout"), FRESH_PROCESS)
def test_what_is_saved_answers_the_same_in_a_fresh_process(name: str, layout: str, quantized: Quantized) -> None:
    made = quantized(name, layout=layout)
    differences = verify(open_artifact(made.path), made.logits, AUTO)
    assert set(differences.values()) == {0} or not EXPECTED[name].exact


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HERE)
def test_the_directory_says_what_it_holds(name: str, layout: str, quantized: Quantized) -> None:
    made = quantized(name, layout=layout)
    artifact = open_artifact(made.path)
    assert (artifact.dtype, artifact.runtime) == (EXPECTED[name].dtype, EXPECTED[name].runtime)
    assert artifact.shape == open_artifact(made.source).shape
    assert (made.path / MODELING_FILE).is_file() == (layout == "uneven" and artifact.runtime == "torch")


@pytest.mark.parametrize("name", HERE)
def test_the_plan_s_bytes_are_those_on_disk(name: str, quantized: Quantized) -> None:
    made = quantized(name, hidden=256)
    source = open_artifact(made.source)
    assert source.shape is not None
    planned = BACKENDS.parse(name).plan(source.shape).bytes
    assert open_artifact(made.path).disk_bytes == pytest.approx(planned, rel=0.1)
    assert planned < source.shape.bytes * (0.51 if EXPECTED[name].runtime == "onnx" else 0.8)


# Half precision


@pytest.mark.parametrize(("name", "dtype"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_half_precision_stores_every_weight_in_half(name: str, dtype: str, quantized: Quantized) -> None:
    assert set(stored(quantized(name).path).values()) == {dtype}


# bitsandbytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "dtype"), [("bnb_8bit", "I8"), ("bnb_4bit", "U8")])
def test_bitsandbytes_leaves_pooler_and_classifier_in_float(
    name: str, dtype: str, family: str, quantized: Quantized
) -> None:
    kinds = stored(quantized(name, family).path)
    heads = [x for x in kinds if x.endswith(".weight") and ("pooler" in x or "classifier" in x)]
    linear = [x for x in kinds if x.endswith(".weight") and ".layer." in x and "norm" not in x.lower()]
    assert (len(heads), len(linear)) == (2, 12)
    assert {kinds[x] for x in heads} == {"F32"}
    assert {kinds[x] for x in linear} == {dtype}


@pytest.mark.parametrize("name", ["bnb_8bit", "bnb_4bit"])
def test_bitsandbytes_models_reload_through_stock_from_pretrained(name: str, quantized: Quantized) -> None:
    from transformers import AutoModelForSequenceClassification

    made = quantized(name)
    reloaded = AutoModelForSequenceClassification.from_pretrained(made.path, dtype="auto", device_map="cpu")
    assert np.array_equal(logits_of(reloaded, made.probe), made.logits)


@pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"double_quant": True}])
def test_the_options_of_4_bit_take_effect(options: dict[str, Any], quantized: Quantized) -> None:
    made, default = quantized("bnb_4bit", **options), quantized("bnb_4bit")
    assert relative(made.logits, default.logits) > 0
    assert open_artifact(made.path).dtype == options.get("quant_type", "nf4")
    nested = [name for name in stored(made.path) if "nested_absmax" in name]
    assert bool(nested) == ("double_quant" in options)


def test_skip_leaves_the_named_modules_in_float(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized("bnb_8bit")
    BACKENDS.parse({"use": "bnb_8bit", "skip": ["intermediate", "classifier"]}).quantize(
        QuantizationJob(made.source, tmp_path, AUTO, made.probe)
    )
    kinds = stored(tmp_path)
    assert kinds["bert.encoder.layer.0.intermediate.dense.weight"] == kinds["classifier.weight"] == "F32"
    assert kinds["bert.pooler.dense.weight"] == kinds["bert.encoder.layer.0.output.dense.weight"] == "I8"


def test_a_skip_that_names_no_module_is_refused(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized("bnb_8bit")
    with pytest.raises(HfcompressError, match="names 'poler', and the model has no such module"):
        BACKENDS.parse({"use": "bnb_8bit", "skip": ["poler"]}).quantize(
            QuantizationJob(made.source, tmp_path, AUTO, made.probe)
        )


def test_widths_that_4_bit_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = cut(factories.model(hidden=64, ffn=128), [Keep((0, 1, 2), tuple(range(128)))] * 2)
    save_model(model, factories.tokenizer(), tmp_path / "float")
    with pytest.raises(HfcompressError, match="64 inputs and 48 outputs"):
        BACKENDS.parse("bnb_4bit").quantize(
            QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HERE)
def test_quantizing_leaves_the_source_alone(name: str, quantized: Quantized) -> None:
    made = quantized(name)
    assert np.array_equal(logits_of(load_model(made.source, AUTO), made.probe), made.plain)
    assert set(stored(made.source).values()) == {"F32"}


@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "bnb_8bit", "bnb_4bit", "torch_int8", "onnx_int8", "onnx_int4"]
)
def test_weights_that_are_not_finite_are_refused_by_name(name: str, tmp_path: Path) -> None:
    import torch

    model = factories.model(hidden=64, ffn=128)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[4, 2] = float("nan")
    save_model(model, factories.tokenizer(), tmp_path / "float")
    (tmp_path / "out").mkdir()
    job = QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
    with pytest.raises(HfcompressError, match=r"layer\.1\.output\.dense"):
        BACKENDS.parse(name).quantize(job)


@pytest.mark.parametrize("name", ["torch_int8", "onnx_int8", "onnx_int4"])
def test_an_outlier_and_a_channel_of_zeros_are_noted(name: str, tmp_path: Path) -> None:
    import torch

    model = factories.model(hidden=64, ffn=128)
    with torch.no_grad():
        weight = model.bert.encoder.layer[1].output.dense.weight
        weight[4, 2], weight[7] = 1e6, 0
    save_model(model, factories.tokenizer(), tmp_path / "float")
    (tmp_path / "out").mkdir()
    job = QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
    found = {(odd.layer, odd.what, odd.channels) for odd in BACKENDS.parse(name).quantize(job).odd_weights}
    odd = ["zeros"] if name == "onnx_int4" else ["outlier", "zeros"]  # a block of its own holds the outlier
    assert found == {("bert.encoder.layer.1.output.dense", what, 1) for what in odd}


@pytest.mark.parametrize("name", ["float16", "bnb_8bit"])
def test_a_weight_that_half_precision_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    import torch

    model = factories.model(hidden=64, ffn=128)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[4, 2] = 1e6
    save_model(model, factories.tokenizer(), tmp_path / "float")
    (tmp_path / "out").mkdir()
    job = QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
    with pytest.raises(HfcompressError, match=r"layer\.1\.output\.dense"):
        BACKENDS.parse(name).quantize(job)
