"""Other libraries find the graph in a directory of ours, and answer as ONNX Runtime does.

tests/optimum has the same for Optimum and sentence-transformers. Transformers.js is found by Node's own variable:
`make test-clients` installs it and sets NODE_PATH.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import load_tokenizer, open_artifact, read_config, save_model
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.models.save_tokenizer import save_tokenizer
from hfcompress.models.surgery import Keep, cut
from hfcompress.onnx.graph_io import JAVASCRIPT_TYPES, run_onnx
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from tests import factories

TEXTS, PAIRS = ["the film was great", "a dull story"], ["it was very good and fine", "the cast"]
TYPES = {"onnx_int8": "int8", "onnx_int4": "int4", "onnx_fp16": "float16"}
SCRIPT = Path(__file__).with_name("transformers_js.cjs")


def quantize(model: Any, folder: Path, use: str, head: str = "sequence") -> Path:
    """Writes the directory of a backend, as a stage does."""
    save_model(model, factories.tokenizer(), folder / "float")
    target = folder / "made"
    target.mkdir()
    probe = make_dummy_inputs(folder / "float")
    job = QuantizationJob(folder / "float", target, f"AutoModel{TASK_HEADS[head]}", probe)
    BACKENDS.parse(use).quantize(job)
    save_tokenizer(load_tokenizer(folder / "float"), target)
    return target


def encode(path: Path, texts: list[str] = TEXTS, pairs: list[str] | None = None) -> dict[str, Any]:
    batch = load_tokenizer(path)(texts, pairs, padding=True, return_tensors="np")
    return {name: value.astype("int64") for name, value in batch.items()}


def graph_of(path: Path) -> Path:
    (graph,) = open_artifact(path).weight_files
    return graph


@pytest.mark.parametrize("use", TYPES)
def test_the_graph_is_in_onnx_under_the_name_of_its_type(use: str, tmp_path: Path) -> None:
    pruned = cut(factories.model(), [Keep((1,), tuple(range(48))), Keep((0, 2, 3), tuple(range(64)))])
    made = quantize(pruned, tmp_path, use)
    names = {"int8": "model_quantized.onnx", "int4": "model_q4.onnx", "float16": "model_fp16.onnx"}
    assert graph_of(made) == made / "onnx" / names[TYPES[use]]
    assert {path.name for path in made.iterdir()} == {"config.json", "onnx", "tokenizer.json", "tokenizer_config.json"}
    config = read_config(made)
    assert config["transformers.js_config"] == {"dtype": JAVASCRIPT_TYPES[TYPES[use]]}
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForSequenceClassification"])


@pytest.mark.parametrize("use", TYPES)
def test_openvino_reads_it(use: str, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    made = quantize(factories.model(hidden=64), tmp_path, use)
    inputs = encode(made)
    compiled = openvino.Core().compile_model(graph_of(made), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    zeros = np.zeros_like(inputs["input_ids"])
    found = compiled({n: inputs.get(n, zeros) for node in compiled.inputs for n in [node.get_any_name()]})["logits"]
    expected = run_onnx(graph_of(made), inputs)
    assert np.abs(found - expected).max() <= 0.02 * np.abs(expected).max()  # it rounds inputs in kernels of its own


@cache
def missing() -> str:
    """Says what is missing to run Transformers.js; empty if it can run."""
    if shutil.which("node") is None:
        return "node is not installed"
    found = subprocess.run(["node", "-e", "require.resolve('@huggingface/transformers')"], capture_output=True)
    return "" if found.returncode == 0 else "NODE_PATH names no folder with @huggingface/transformers"


def answer_in_node(path: Path, task: str, texts: list[str] = TEXTS, pairs: list[str] | None = None) -> dict[str, Any]:
    told = json.dumps({"texts": texts, "pairs": pairs})
    done = subprocess.run(
        ["node", str(SCRIPT), str(path), task], input=told, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
@pytest.mark.skipif("missing()", reason="Transformers.js is not installed")
@pytest.mark.parametrize("use", TYPES)
def test_transformers_js_finds_it_without_options(use: str, tmp_path: Path) -> None:
    pruned = cut(factories.model(hidden=64), [Keep((1,), tuple(range(48))), Keep((0, 2, 3), tuple(range(64)))])
    made = quantize(pruned, tmp_path, use)
    found = answer_in_node(made, "text-classification")
    expected = run_onnx(graph_of(made), encode(made))
    assert found["dtype"] == JAVASCRIPT_TYPES[TYPES[use]]
    np.testing.assert_allclose(found["logits"], expected, atol=1e-3 * np.abs(expected).max())
    assert len(found["answers"]) == 2
    paired = answer_in_node(made, "text-classification", pairs=PAIRS)["logits"]
    np.testing.assert_allclose(
        paired, run_onnx(graph_of(made), encode(made, pairs=PAIRS)), atol=1e-3 * np.abs(expected).max()
    )


@pytest.mark.slow
@pytest.mark.skipif("missing()", reason="Transformers.js is not installed")
@pytest.mark.parametrize(("head", "task"), [("token", "token-classification"), ("mask", "fill-mask")])
def test_transformers_js_reads_other_heads(head: str, task: str, tmp_path: Path) -> None:
    made = quantize(factories.model(hidden=64, head=head), tmp_path, "onnx_int8", head)
    texts = [f"{text} [MASK]" for text in TEXTS]
    found = np.array(answer_in_node(made, task, texts)["logits"])
    expected = run_onnx(graph_of(made), encode(made, texts))
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
