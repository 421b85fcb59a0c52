"""OpenVINO: what is planned and refused everywhere, and what is stored and answered where it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import open_artifact, weights_hash
from hfcompress.models.shape import shape_of
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.backends.openvino_int8 import OpenvinoInt8
from hfcompress.quantization.calibration import iterate_rows
from hfcompress.run.push import list_uploads
from hfcompress.utils.errors import HfcompressError
from tests import factories

needs_openvino = pytest.mark.skipif(
    OpenvinoInt8().unavailable() is not None, reason="OpenVINO needs an environment of its own"
)
LAYOUTS = ("stock", "uneven")
NEAR = 0.2
"""Of the largest logit, or of 1: how far int8, and bfloat16 where the CPU has it, may move a random model's answer."""


def backend(**options: Any) -> Any:
    return BACKENDS.parse({"use": "openvino_int8", **options})


def rows(count: int, length: int = 12) -> Sequence[Any]:
    return [{k: v.numpy() for k, v in factories.batch(4, length, seed).items()} for seed in range(-(-count // 4))]


# Everywhere


def test_the_plan_stores_every_matrix_in_8_bits() -> None:
    shape = shape_of({"model_type": "bert"})
    planned = backend().plan(shape)
    assert (planned.linear_bits, planned.head_bits, planned.embedding_bits) == (8, 8, 8)
    assert 0.25 < planned.bytes / shape.bytes < 0.27


@pytest.mark.parametrize(
    ("config", "head", "why"),
    [
        ({"model_type": "modernbert"}, None, "cannot export a modernbert model; onnx_int8 can"),
        ({"model_type": "llama"}, "causal", "cannot export a causal task head"),
        ({"model_type": "roberta"}, "span", ""),
    ],
)
def test_what_optimum_intel_cannot_export_is_refused(config: dict[str, Any], head: str | None, why: str) -> None:
    found = backend().problems(shape_of(config, head=head))
    assert (why in found[0]) if why else found == []


def test_rows_for_weights_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="`weights_only` does not quantize them"):
        backend(weights_only=True, rows=8)
    assert backend(weights_only=True).weights_only
    assert backend(rows=8).rows == 8


OWN = "python -m venv"


@pytest.mark.parametrize(
    ("missing", "versions", "why", "repair"),
    [
        ([], {}, None, None),
        ([], {"torchvision": "0.28.0+cpu"}, None, None),
        ([], {"torchvision": "0.28.0", "torch": "2.13.0"}, None, None),
        ([], {"torchvision": "0.28.0"}, "breaks transformers beside a CPU torch", "pip uninstall -y torchvision"),
        ([], {"transformers": "5.23.0"}, "needs transformers<5.6, and 5.23.0 is installed", OWN),
        (["nncf"], {}, "nncf is not installed", "pip install 'hfcompress[openvino]'"),
        (["openvino"], {"transformers": "5.6.0"}, "needs transformers<5.6 and huggingface_hub<1.22", OWN),
    ],
)
def test_why_it_cannot_run_and_the_command_that_mends_it(
    missing: list[str], versions: dict[str, str], why: str | None, repair: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"transformers": "5.5.4", "torch": "2.13.0+cpu", **versions}

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(OpenvinoInt8, "missing_modules", lambda _: missing)
    found = backend().unavailable()
    if why is None or repair is None:
        assert found is None
    else:
        assert why in found[0]
        assert repair in found[1]


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


Quantized = Callable[..., tuple[Path, Path, Any, Any]]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments: source, target, float model, and what `quantize` returned."""
    from hfcompress.models.artifact import load_model, save_model
    from hfcompress.models.dummy_inputs import make_dummy_inputs
    from hfcompress.models.surgery import Keep, cut

    @cache
    def make(family: str = "bert", layout: str = "stock", head: str = "sequence", **options: Any) -> Any:
        origin, target = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("openvino")
        model, auto = factories.model(family, head=head), f"AutoModel{TASK_HEADS[head]}"
        if layout == "uneven":
            model = cut(model, [Keep((1, 3), tuple(range(48))), Keep((), tuple(range(0, 64, 4)))])
        save_model(model, factories.tokenizer(), origin)
        logits = backend(**options).quantize(QuantizationJob(origin, target, auto, make_dummy_inputs(origin), rows))
        factories.tokenizer().save_pretrained(target)
        return origin, target, load_model(origin, auto), logits

    return make


def moved(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest logit or 1."""
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def answers(path: Path, batch: Any) -> Any:
    from hfcompress.measure.worker import OpenVinoModel

    model = OpenVinoModel(str(path), threads=1)
    return model(model.place(batch))


def array_batch(*size: int) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in factories.batch(*size).items()}


@needs_openvino
@pytest.mark.parametrize(
    ("family", "layout", "head"),
    [
        ("bert", "uneven", "sequence"),
        ("roberta", "stock", "span"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("bert", "stock", "mask"),
                ("bert", "uneven", "token"),
                *((family, "stock", "sequence") for family in ("distilbert", "xlm-roberta", "electra", "mpnet")),
                *((family, "stock", "sequence") for family in ("deberta-v2", "albert", "llama", "qwen2", "qwen3")),
            ]
        ),
    ],
)
def test_it_answers_like_the_float_model_at_any_batch_and_length(
    family: str, layout: str, head: str, quantized: Quantized
) -> None:
    from hfcompress.models.dummy_inputs import logits_of

    _, target, model, _ = quantized(family, layout, head)
    for size in ((1, 5), (3, 17)):
        batch = array_batch(*size)
        found, expected = answers(target, batch), logits_of(model, batch)
        assert found.shape == expected.shape
        real = batch["attention_mask"].astype(bool) if head != "sequence" else ...
        assert 0 < moved(found[real], expected[real]) <= NEAR


@needs_openvino
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_answers_the_same_in_a_fresh_process(layout: str, quantized: Quantized) -> None:
    from hfcompress.measure.process import ModelProcess
    from hfcompress.measure.verify import verify

    source, target, _, logits = quantized("bert", layout)
    artifact = open_artifact(target)
    assert artifact.shape == open_artifact(source).shape
    assert verify(artifact, logits, "AutoModelForSequenceClassification") == {"openvino": 0}
    with ModelProcess(artifact, "AutoModelForSequenceClassification", threads=1) as process:
        process.prepare([array_batch(2, 8)])
        assert len(process.time()) == 1
        assert process.peak_bytes() > 10_000_000


@needs_openvino
@pytest.mark.parametrize("head", ["sequence", "span"])
def test_optimum_loads_the_directory(head: str, quantized: Quantized) -> None:
    import optimum.intel
    import torch

    from hfcompress.models.dummy_inputs import make_dummy_inputs
    from hfcompress.models.forward import logits_of_output

    source, target, _, logits = quantized("roberta" if head == "span" else "bert", head=head)
    model = getattr(optimum.intel, f"OVModel{TASK_HEADS[head]}").from_pretrained(target)
    inputs = {name: torch.from_numpy(value) for name, value in make_dummy_inputs(source).items()}
    assert np.array_equal(logits_of_output(model(**inputs)).numpy(), logits)


def constants(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every constant of two dimensions or more."""
    layers = ElementTree.parse(path / "openvino_model.xml").getroot().iterfind("layers/layer[@type='Const']/data")
    found = [(x.get("element_type", ""), tuple(int(n) for n in x.get("shape", "").split(",") if n)) for x in layers]
    return [(kind, shape) for kind, shape in found if len(shape) > 1 and min(shape) > 1]


@needs_openvino
@pytest.mark.parametrize("options", [{}, {"weights_only": True}])
def test_every_matrix_of_weights_is_in_8_bits(options: dict[str, Any], quantized: Quantized) -> None:
    _, target, _, _ = quantized(**options)
    kinds = dict.fromkeys(kind for kind, shape in constants(target) if shape in ((32, 32), (64, 32), (32, 64)))
    assert set(kinds) <= {"i8", "u8"}
    assert (len(factories.WORDS), 32) in [shape for kind, shape in constants(target) if kind in ("i8", "u8")]
    assert len([1 for kind, _ in constants(target) if kind in ("i8", "u8")]) >= 2 * 6 + 1
    activations = [x for x in ElementTree.parse(target / "openvino_model.xml").getroot().iter("layer")
                   if x.get("type") == "FakeQuantize"]  # fmt: skip
    assert bool(activations) == (not options)
    assert open_artifact(target).dtype == "int8"


@needs_openvino
def test_padding_of_the_calibration_rows_changes_nothing(quantized: Quantized, tmp_path: Path) -> None:
    from hfcompress.models.dummy_inputs import make_dummy_inputs

    source, target, _, _ = quantized()

    def padded(count: int) -> Sequence[Any]:
        return [{name: np.pad(value, ((0, 0), (0, 9))) for name, value in batch.items()} for batch in rows(count)]

    job = QuantizationJob(source, tmp_path, "AutoModelForSequenceClassification", make_dummy_inputs(source), padded)
    backend().quantize(job)
    assert (tmp_path / "openvino_model.bin").read_bytes() == (target / "openvino_model.bin").read_bytes()


@needs_openvino
def test_no_rows_and_an_export_that_differs_are_refused(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcompress.models import dummy_inputs as probe

    source, _, _, _ = quantized()
    job = QuantizationJob(source, tmp_path, "AutoModelForSequenceClassification", probe.make_dummy_inputs(source))
    with pytest.raises(HfcompressError, match="no rows to calibrate on"):
        backend().quantize(job)
    monkeypatch.setattr(probe, "logits_of", lambda *_: np.full((4, 2), np.nan))
    with pytest.raises(HfcompressError, match="the exported graph differs from the model"):
        backend().quantize(job)
    assert list(tmp_path.iterdir()) == []
