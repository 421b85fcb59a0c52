"""OpenVINO: what is planned and refused everywhere, and what is stored and answered where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hfcompress.measure.process import ModelProcess
from hfcompress.measure.verify import verify
from hfcompress.measure.worker import OpenVinoModel
from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import load_model, open_artifact, save_model, weights_hash
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.graph_io import EXPORT_TOLERANCE
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.backends.openvino_int8 import OpenvinoInt8
from hfcompress.quantization.calibration import iterate_rows
from hfcompress.quantization.graphs import openvino
from hfcompress.run.push import list_uploads
from hfcompress.utils.errors import HfcompressError
from tests import factories

needs_openvino = pytest.mark.skipif(OpenvinoInt8().unavailable() is not None, reason="OpenVINO is not installed")
LAYOUTS = ("stock", "uneven")
NEAR = 0.2
"""Of the largest logit, or of 1: how far int8, and bfloat16 where the CPU has it, may move a random model's answer."""


def backend(**options: Any) -> Any:
    return BACKENDS.parse({"use": "openvino_int8", **options})


def rows(_count: int) -> Sequence[Any]:
    """Calibration rows; few, because a model of random weights needs no more."""
    return [{k: v.numpy() for k, v in factories.batch(4, 12, seed).items()} for seed in range(2)]


# Everywhere


def test_the_plan_stores_every_matrix_in_8_bits() -> None:
    shape = shape_of({"model_type": "bert"})
    planned = backend().plan(shape)
    assert (planned.linear_bits, planned.head_bits) == (8, 8)
    assert 0.25 < planned.bytes / shape.bytes < 0.27


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"weights_only": True, "rows": 8}, "`weights_only` does not quantize them"),
        ({"weights_only": True, "method": "qdq"}, "`weights_only` does not quantize them"),
        ({"calibration": "entropy"}, "`calibration` is for `method: qdq`"),
        ({"method": "qdq", "percentile": 99.0}, "`percentile` is for `calibration: percentile`"),
        ({"method": "qdq", "preset": "performance"}, "`preset` is for `method: nncf`"),
    ],
)
def test_options_that_nothing_reads_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        backend(**options)


def test_the_graph_of_qdq_is_calibrated_as_the_options_say() -> None:
    made = backend(method="qdq", calibration="percentile", percentile=99.0, rows=7).static
    assert (made.mode, made.calibration, made.percentile, made.rows) == ("static", "percentile", 99.0, 7)


@pytest.mark.parametrize(
    ("missing", "why"),
    [(["nncf"], "nncf is not installed"), (["openvino", "nncf"], "openvino and nncf are not installed")],
)
def test_what_is_missing_is_told_with_the_command_that_installs_it(
    missing: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenvinoInt8, "missing_modules", lambda _: missing)
    assert backend().unavailable() == (why, "pip install 'hfcompress[openvino]'")


def test_only_the_graph_of_qdq_can_be_trained() -> None:
    assert "method: qdq" in backend().untrainable()
    assert backend(method="qdq").untrainable() == ""
    assert (backend().training_ranges, backend(method="qdq").training_ranges) == ((), ("ema", "learned"))


def test_a_module_inside_a_package_that_is_not_there_is_missing() -> None:
    class Other(OpenvinoInt8):
        modules = ("no_such_package.inner", "json")

    assert Other().missing_modules() == ["no_such_package.inner"]


def graph(path: Path, *types: str) -> Path:
    """The files of an OpenVINO model that nobody can run."""
    path.mkdir(parents=True, exist_ok=True)
    layers = "".join(f'<layer type="Const"><data element_type="{t}" size="4096"/></layer>' for t in types)
    # A shape is a constant too, of a few bytes.
    small = '<layer type="Const"><data element_type="u8" size="1"/></layer>'
    (path / "openvino_model.xml").write_text(f"<net><layers>{layers}{small}</layers></net>", encoding="utf-8")
    (path / "openvino_model.bin").write_bytes(b"1234")
    (path / "config.json").write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (["f32", "i64"], "float32"),
        (["f32", "i8"], "int8"),
        (["u8"], "int8"),
        (["u4", "i8"], "int4"),
        (["f16"], "float16"),
    ],
)
def test_a_directory_is_told_by_its_graph(types: list[str], dtype: str, tmp_path: Path) -> None:
    artifact = open_artifact(graph(tmp_path, *types))
    assert (artifact.runtime, artifact.dtype) == ("openvino", dtype)
    assert [file.name for file in artifact.weight_files] == ["openvino_model.bin", "openvino_model.xml"]
    assert artifact.disk_bytes == sum(file.stat().st_size for file in artifact.weight_files)


def test_safetensors_beside_a_graph_are_what_is_opened(tmp_path: Path) -> None:
    factories.save(factories.model(), tmp_path)
    (tmp_path / "openvino_model.xml").write_text("<net/>", encoding="utf-8")
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    assert open_artifact(tmp_path).runtime == "torch"


@pytest.mark.parametrize(
    ("left", "why"), [("openvino_model.bin", "pickled weights only"), ("openvino_model.xml", "no w")]
)
def test_half_of_a_graph_is_no_weights(left: str, why: str, tmp_path: Path) -> None:
    graph(tmp_path, "i8")
    for name in {"openvino_model.bin", "openvino_model.xml"} - {left}:
        (tmp_path / name).unlink()
    with pytest.raises(HfcompressError, match=why):
        open_artifact(tmp_path)


def test_the_hash_sees_weights_and_graph(tmp_path: Path) -> None:
    before = weights_hash(graph(tmp_path, "i8"))
    (tmp_path / "openvino_model.bin").write_bytes(b"4321")
    changed = weights_hash(tmp_path)
    graph(tmp_path, "u8")
    assert len({before, changed, weights_hash(tmp_path)}) == 3


def test_push_sends_the_graph_and_no_other_bin(tmp_path: Path) -> None:
    graph(tmp_path, "i8")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    for name in ("pytorch_model.bin", "training_args.bin"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    sent = {file.name for file in list_uploads(tmp_path)}
    assert sent == {"README.md", "config.json", "openvino_model.bin", "openvino_model.xml"}


def test_rows_are_calibrated_on_alone_and_without_padding() -> None:
    batch = {"input_ids": np.array([[7, 8, 9], [5, 0, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 0, 0]])}
    long, short = iterate_rows([batch], ["input_ids", "token_type_ids"])
    assert long["input_ids"].tolist() == [[7, 8, 9]]
    assert (short["input_ids"].tolist(), short["token_type_ids"].tolist()) == ([[5]], [[0]])
    assert set(short) == {"input_ids", "token_type_ids"}


# Where OpenVINO is installed


@dataclass(frozen=True)
class Made:
    source: Path
    path: Path
    model: Any
    """The float model."""
    auto: str
    logits: Any
    """The logits that `quantize` returned."""


Quantized = Callable[..., Made]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def source(family: str, layout: str, head: str) -> Path:
        path, model = tmp_path_factory.mktemp("float"), factories.model(family, head=head)
        if layout == "uneven":
            model = cut(model, [Keep((1, 3), tuple(range(48))), Keep((), tuple(range(0, 64, 4)))])
        save_model(model, factories.tokenizer(), path)
        return path

    @cache
    def make(
        use: str = "openvino_int8", family: str = "bert", layout: str = "stock", head: str = "sequence", **options: Any
    ) -> Made:
        origin, target = source(family, layout, head), tmp_path_factory.mktemp("openvino")
        auto = f"AutoModel{TASK_HEADS[head]}"
        made = BACKENDS.parse({"use": use, **options}).quantize(
            QuantizationJob(origin, target, auto, make_dummy_inputs(origin), rows)
        )
        factories.tokenizer().save_pretrained(target)
        return Made(origin, target, load_model(origin, auto), auto, made.logits)

    return make


def moved(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest logit or 1."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def load(path: Path, auto: str = "AutoModelForSequenceClassification", dtype: str | None = None) -> OpenVinoModel:
    return OpenVinoModel(str(path), threads=1, auto_class=auto, dtype=dtype)


def array_batch(*size: int) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in factories.batch(*size).items()}


def distance(made: Made, dtype: str | None = None) -> float:
    """The largest difference from the float model, at two batch sizes and lengths, with padding."""
    loaded, found = load(made.path, made.auto, dtype), []
    for size in ((1, 5), (3, 17)):
        batch = array_batch(*size)
        logits, expected = loaded(loaded.place(batch)), logits_of(made.model, batch)
        assert logits.shape == expected.shape
        real = ... if made.auto.endswith("SequenceClassification") else batch["attention_mask"].astype(bool)
        found.append(moved(logits[real], expected[real]))
    return max(found)


@needs_openvino
@pytest.mark.parametrize(
    ("family", "layout", "head"),
    [
        ("bert", "uneven", "sequence"),
        ("bert", "uneven", "token"),
        ("roberta", "stock", "span"),
        *(
            pytest.param(family, layout, head, marks=pytest.mark.slow)
            for family, head in factories.headed()
            for layout in (LAYOUTS if family == "bert" else ("stock",))
            if (family, layout, head) not in {("bert", "uneven", "sequence"), ("bert", "uneven", "token")}
        ),
    ],
)
def test_the_float_graph_gives_the_model_s_answers(family: str, layout: str, head: str, quantized: Quantized) -> None:
    made = quantized("openvino", family, layout, head)
    assert distance(made, "float32") <= EXPORT_TOLERANCE
    assert distance(made) <= 0.05  # in bfloat16 where the processor has it


@needs_openvino
@pytest.mark.parametrize(
    ("options", "layout", "head"),
    [
        ({}, "uneven", "sequence"),
        ({"method": "qdq"}, "uneven", "sequence"),
        ({"weights_only": True}, "stock", "sequence"),
        *(
            pytest.param(options, layout, head, marks=pytest.mark.slow)
            for options in ({}, {"method": "qdq"}, {"preset": "performance"}, {"weights_only": True})
            for layout in LAYOUTS
            for head in ("token", "span", "mask")
        ),
    ],
    ids=str,
)
def test_int8_answers_like_the_float_model(
    options: dict[str, Any], layout: str, head: str, quantized: Quantized
) -> None:
    assert 0 < distance(quantized(layout=layout, head=head, **options)) <= NEAR


@needs_openvino
@pytest.mark.parametrize(("use", "options"), [("openvino", {}), ("openvino_int8", {})])
def test_what_is_saved_answers_the_same_in_a_fresh_process(
    use: str, options: dict[str, Any], quantized: Quantized
) -> None:
    made = quantized(use, layout="uneven", **options)
    artifact = open_artifact(made.path)
    assert artifact.shape == open_artifact(made.source).shape
    assert verify(artifact, made.logits, made.auto) == {"openvino": pytest.approx(0, abs=1e-5)}
    with ModelProcess(artifact, made.auto, threads=1) as process:
        process.prepare([array_batch(2, 8)])
        assert process.time().seconds
        assert process.peak_memory()[0] > 10_000_000
        # The processor decides which of these it is.
        assert process.dtype in (("float32", "bfloat16") if use == "openvino" else ("int8", "int8 and bfloat16"))


@needs_openvino
def test_the_type_it_computes_in_is_read_from_the_compiled_graph(quantized: Quantized) -> None:
    stored = {"openvino": "float32", "openvino_int8": "int8"}
    for use, dtype in stored.items():
        assert load(quantized(use, layout="uneven").path, dtype="float32").computing_type() == dtype
    # The weights become floats before each product.
    assert load(quantized(weights_only=True).path, dtype="float32").computing_type() == "float32"


def constants(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every constant of two dimensions or more."""
    layers = ElementTree.parse(path / "openvino_model.xml").getroot().iterfind("layers/layer[@type='Const']/data")
    found = [(x.get("element_type", ""), tuple(int(n) for n in x.get("shape", "").split(",") if n)) for x in layers]
    return [(kind, shape) for kind, shape in found if len(shape) > 1 and min(shape) > 1]


@needs_openvino
@pytest.mark.parametrize("options", [{}, {"method": "qdq"}, {"weights_only": True}], ids=str)
def test_every_matrix_of_weights_is_in_8_bits(options: dict[str, Any], quantized: Quantized) -> None:
    path = quantized(**options).path
    kinds = dict.fromkeys(kind for kind, shape in constants(path) if {*shape} <= {32, 64, 96})
    assert set(kinds) <= {"i8", "u8"}
    assert (len(factories.WORDS), 32) in [shape for kind, shape in constants(path) if kind in ("i8", "u8")]
    activations = [x for x in ElementTree.parse(path / "openvino_model.xml").getroot().iter("layer")
                   if x.get("type") == "FakeQuantize"]  # fmt: skip
    assert bool(activations) == (options == {} or "method" in options)
    assert open_artifact(path).dtype == "int8"


@needs_openvino
def test_float16_weights_halve_the_file(quantized: Quantized) -> None:
    whole, half = (open_artifact(quantized("openvino", weights=kind).path) for kind in ("float32", "float16"))
    assert (whole.dtype, half.dtype) == ("float32", "float16")
    assert (half.path / "openvino_model.bin").stat().st_size < 0.52 * (whole.path / "openvino_model.bin").stat().st_size


@needs_openvino
@pytest.mark.parametrize("options", [{}, {"method": "qdq"}, {"weights_only": True}], ids=str)
def test_kept_layers_stay_in_float32(options: dict[str, Any], quantized: Quantized, tmp_path: Path) -> None:
    source, kept = quantized().source, "bert.encoder.layer.0.intermediate.dense"
    auto, probe = "AutoModelForSequenceClassification", make_dummy_inputs(source)
    backend(**options).quantize(QuantizationJob(source, tmp_path, auto, probe, rows, keep=frozenset({kept})))
    floats = [shape for kind, shape in constants(tmp_path) if kind == "f32" and {*shape} == {32, 64}]
    assert len(floats) == 1


@needs_openvino
def test_padding_of_the_calibration_rows_changes_nothing(quantized: Quantized, tmp_path: Path) -> None:
    made = quantized()

    def padded(count: int) -> Sequence[Any]:
        return [{name: np.pad(value, ((0, 0), (0, 9))) for name, value in batch.items()} for batch in rows(count)]

    backend().quantize(QuantizationJob(made.source, tmp_path, made.auto, make_dummy_inputs(made.source), padded))
    assert (tmp_path / "openvino_model.bin").read_bytes() == (made.path / "openvino_model.bin").read_bytes()


@needs_openvino
def test_no_usage_data_are_sent(quantized: Quantized) -> None:
    import openvino_telemetry

    quantized()
    assert openvino_telemetry.Telemetry().consent is False


@needs_openvino
def test_no_rows_and_a_graph_that_differs_are_refused(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantized()
    job = QuantizationJob(made.source, tmp_path, made.auto, make_dummy_inputs(made.source))
    with pytest.raises(HfcompressError, match="no rows to calibrate on"):
        backend().quantize(job)
    monkeypatch.setattr(openvino, "run_openvino", lambda *_: np.full((4, 2), np.nan))
    with pytest.raises(HfcompressError, match="the exported graph differs from the model"):
        backend().quantize(job)
    assert list(tmp_path.iterdir()) == []
