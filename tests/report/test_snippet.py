"""The code in a card runs as it stands, for every type of task and every way to load a model."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.data.fill_mask import FillMask
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.tokens import TokenClassification
from hfcompress.models.artifact import load_tokenizer, note_problem_type, open_artifact, save_model
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization.backends.base import QuantizationJob
from hfcompress.quantization.backends.onnx_int8 import OnnxInt8
from hfcompress.report.snippet import Snippet, write_snippets
from tests import factories

NAMES = ["negative", "positive"]
TASKS: dict[str, Any] = {
    "one text": TextClassification(dataset="d", text=["sentence"], max_length=16),
    "pair": TextClassification(dataset="d", text=["premise", "hypothesis"], max_length=24),
    "scores": Regression(dataset="d", text=["sentence1", "sentence2"], max_length=24),
    "tokens": TokenClassification(dataset="d", max_length=16),
    "question": QuestionAnswering(dataset="d", max_length=32, stride=8),
    "masks": FillMask(dataset="d", max_length=16),
}


def save_for(task: Any, path: Path, model: Any = None) -> Path:
    """A random BERT with the head of a task, or `model`."""
    labels = 1 if task.type == "regression" else 2
    built = model or factories.model(head=task.head, labels=labels)
    if task.type == "text-classification":
        built.config.id2label, built.config.label2id = dict(enumerate(NAMES)), {n: i for i, n in enumerate(NAMES)}
    save_model(built, factories.tokenizer(), path)
    note_problem_type(path, task.problem_type)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[Snippet], list[str]]:
    """Runs a snippet; the lines that it prints."""

    def _run(snippet: Snippet) -> list[str]:
        assert snippet.language == "python"
        capsys.readouterr()
        exec(snippet.code, {})
        return capsys.readouterr().out.splitlines()

    return _run


def by_title(task: Any, path: Path) -> dict[str, Snippet]:
    return {snippet.title: snippet for snippet in write_snippets(task, open_artifact(path), str(path))}


@pytest.mark.parametrize("name", TASKS)
def test_pytorch_answers_a_batch_as_the_pipeline_does(
    name: str, tmp_path: Path, run: Callable[[Snippet], list[str]]
) -> None:
    task = TASKS[name]
    found = by_title(task, save_for(task, tmp_path))
    lines = run(found[task.auto_class])
    if name == "question":  # transformers has no pipeline for it any more
        assert list(found) == ["AutoModelForQuestionAnswering"]
        assert len(lines) == 2
        return
    assert list(found) == ["A pipeline", task.auto_class]
    answers = run(found["A pipeline"])
    assert len(answers) == 2
    if name in ("one text", "pair"):
        assert [line.split(" | ")[0] for line in lines] == [answer.split()[0] for answer in answers]
    elif name == "scores":
        assert [float(line.split(" | ")[0]) for line in lines] == pytest.approx([*map(float, answers)], abs=1e-4)
    elif name == "tokens":
        words = [word for answer in answers for word in ast.literal_eval(answer)]
        assert {line.split()[-1] for line in lines} >= {label for _, label in words}
    else:
        assert lines == answers


@pytest.mark.parametrize("name", TASKS)
def test_onnx_runtime_answers_a_batch(name: str, tmp_path: Path, run: Callable[[Snippet], list[str]]) -> None:
    task, graph = TASKS[name], tmp_path / "graph"
    source = save_for(task, tmp_path / "source")
    graph.mkdir()
    OnnxInt8().quantize(QuantizationJob(source, graph, task.auto_class, make_dummy_inputs(source)))
    load_tokenizer(source).save_pretrained(graph)
    found = by_title(task, graph)
    lines = run(found["ONNX Runtime"])
    assert len(lines) >= 2
    if task.head == "sequence":
        expected = run(by_title(task, source)[task.auto_class])
        words = [[line.split(" | ")[0] for line in each] for each in (lines, expected)]
        if name == "scores":
            assert [*map(float, words[0])] == pytest.approx([*map(float, words[1])], abs=0.3)
        assert all(len(set(each)) <= 2 for each in words)
    assert ("Optimum" in found) == (name != "question"), "Optimum expects two outputs of a model that answers questions"


def test_texts_of_unequal_length_are_one_batch(tmp_path: Path) -> None:
    task = TASKS["one text"]
    (_, snippet) = write_snippets(task, open_artifact(save_for(task, tmp_path)), str(tmp_path))
    scope: dict[str, Any] = {}
    exec(snippet.code, scope)
    mask = scope["batch"]["attention_mask"]
    assert mask.sum(1).unique().numel() == 2
    assert scope["logits"].shape == (2, 2)


def test_a_pruned_model_says_which_code_it_runs_and_why(tmp_path: Path, run: Callable[[Snippet], list[str]]) -> None:
    task = TASKS["one text"]
    uneven = cut(factories.model(), [Keep((0,), tuple(range(8))), Keep((0, 1, 2), tuple(range(16)))])
    found = by_title(task, save_for(task, tmp_path, uneven))
    assert "`modeling_pruned.py`" in found["A pipeline"].note
    for snippet in found.values():
        assert "trust_remote_code=True" in snippet.code
        assert len(run(snippet)) == 2


def test_a_model_of_int8_layers_imports_hfcompress(tmp_path: Path, run: Callable[[Snippet], list[str]]) -> None:
    from hfcompress.quantization.backends.torch_int8 import TorchInt8

    task, small = TASKS["one text"], tmp_path / "small"
    source = save_for(task, tmp_path / "source")
    small.mkdir()
    TorchInt8().quantize(QuantizationJob(source, small, task.auto_class, make_dummy_inputs(source)))
    load_tokenizer(source).save_pretrained(small)
    found = by_title(task, small)
    assert found["A pipeline"].packages == ("transformers", "torch", "hfcompress")
    for snippet in found.values():
        assert snippet.code.startswith("import hfcompress")
        assert len(run(snippet)) == 2


@pytest.mark.parametrize(
    ("graph", "precision"),
    [("onnx/model_quantized.onnx", "q8"), ("onnx/model_fp16.onnx", "fp16"), ("onnx/model_q4.onnx", "q4"),
     ("onnx/model.onnx", "fp32"), ("model.onnx", None), ("onnx/other.onnx", None)],
)  # fmt: skip
def test_transformers_js_finds_a_graph_by_its_name(graph: str, precision: str | None, tmp_path: Path) -> None:
    task = TASKS["one text"]
    artifact = replace(open_artifact(save_for(task, tmp_path)), runtime="onnx", graph=graph)
    found = {snippet.title: snippet for snippet in write_snippets(task, artifact, "user/tiny")}
    assert ("Transformers.js" in found) == (precision is not None)
    if precision is not None:
        assert f'dtype: "{precision}"' in found["Transformers.js"].code
        assert found["Transformers.js"].install == "npm install @huggingface/transformers"
    assert f'folder / "{graph}"' in found["ONNX Runtime"].code


def test_a_command_quotes_the_names_that_a_shell_would_expand(tmp_path: Path) -> None:
    task = TASKS["one text"]
    artifact = replace(open_artifact(save_for(task, tmp_path)), runtime="onnx", graph="model.onnx")
    found = {snippet.title: snippet for snippet in write_snippets(task, artifact, "user/tiny")}
    assert found["Optimum"].install == "pip install 'optimum-onnx[onnxruntime]'"


def test_the_code_for_openvino_needs_openvino_alone(tmp_path: Path) -> None:
    task = TASKS["one text"]
    artifact = replace(open_artifact(save_for(task, tmp_path)), runtime="openvino", graph="openvino_model.xml")
    (snippet,) = write_snippets(task, artifact, "user/tiny")
    assert snippet.install == "pip install openvino transformers"
    assert "OVModelForSequenceClassification" in snippet.note
    compile(snippet.code, "snippet", "exec")


def test_the_code_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = TASKS["one text"]
    for snippet in write_snippets(task, open_artifact(save_for(task, tmp_path)), str(tmp_path)):
        exec(snippet.code, {})
    assert torch.is_grad_enabled()
