"""Directories of our own ONNX backends, made by this hfcompress, load in Optimum's classes and answer the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.nn import Identity

from hfcompress.models.artifact import load_tokenizer, open_artifact, save_model
from hfcompress.models.dummy_inputs import DummyInputs, make_dummy_inputs
from hfcompress.models.save_tokenizer import save_tokenizer
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.graph_io import run_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from tests import factories
from tests.optimum.loaded import CLASSES, answers, auto_class

WAYS: list[Any] = [name for name in BACKENDS.names() if name.startswith("onnx_")]
WAYS.append({"use": "onnx_int8", "mode": "static", "rows": 8})


def rows(count: int) -> list[DummyInputs]:
    return [{name: tensor.numpy() for name, tensor in factories.batch(count, 9).items()}]


def quantized(way: Any, source: Path, target: Path, head: str = "sequence") -> tuple[DummyInputs, Any]:
    target.mkdir()
    probe = make_dummy_inputs(source)
    job = QuantizationJob(source, target, auto_class(head), probe, rows)
    return probe, BACKENDS.parse(way).quantize(job).logits


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("head", CLASSES)
def test_each_head_of_each_way(head: str, way: Any, tmp_path: Path) -> None:
    source = factories.save(factories.model(head=head, hidden=64), tmp_path / "float")
    probe, logits = quantized(way, source, tmp_path / "made", head)
    assert np.array_equal(answers(tmp_path / "made", head, probe), logits)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra"])
def test_each_family_of_each_way(family: str, way: Any, tmp_path: Path) -> None:
    source = factories.save(factories.model(family, hidden=64), tmp_path / "float")
    probe, logits = quantized(way, source, tmp_path / "made")
    assert np.array_equal(answers(tmp_path / "made", "sequence", probe), logits)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_pruned_shape_needs_no_code_of_ours(way: Any, tmp_path: Path) -> None:
    model = cut(factories.model(hidden=64), [Keep((1,), tuple(range(48))), Keep((0, 2, 3), tuple(range(64)))])
    save_model(model, factories.tokenizer(), tmp_path / "float")
    probe, logits = quantized(way, tmp_path / "float", tmp_path / "made")
    assert np.array_equal(answers(tmp_path / "made", "sequence", probe), logits)


def test_its_pipeline_tells_the_labels_by_name(data: Path, teacher: Path, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer, pipeline

    quantized("onnx_int8", teacher, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = ORTModelForSequenceClassification.from_pretrained(tmp_path / "made")
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    found = classify(["the film was great", "the film was awful"])
    assert [answer["label"] for answer in found] == ["LABEL_1", "LABEL_0"]


@pytest.mark.parametrize("way", ["onnx_int8", "onnx_int4"])
def test_sentence_transformers_loads_the_file_by_its_name(way: str, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = factories.save(factories.model(hidden=64, labels=1), tmp_path / "float")
    quantized(way, source, tmp_path / "made")
    tokenizer = load_tokenizer(source)
    save_tokenizer(tokenizer, tmp_path / "made")
    (graph,) = open_artifact(tmp_path / "made").weight_files
    name = graph.relative_to(tmp_path / "made").as_posix()
    model = sentence_transformers.CrossEncoder(
        str(tmp_path / "made"), backend="onnx", model_kwargs={"file_name": name}, activation_fn=Identity()
    )
    pairs = [("the film was great", "a dull story"), ("it was very good and fine", "the cast")]
    batch = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="np")
    expected = run_onnx(graph, {name: value.astype("int64") for name, value in batch.items()})
    np.testing.assert_allclose(model.predict(pairs), expected[:, 0], atol=1e-4 * np.abs(expected).max())
