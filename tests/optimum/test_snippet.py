"""The code for Optimum in a card runs as it stands, and answers as the code for ONNX Runtime does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfcompress.data.fill_mask import FillMask
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.tokens import TokenClassification
from hfcompress.models.artifact import load_tokenizer, note_problem_type, open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.models.save_tokenizer import save_tokenizer
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.report.snippet import write_snippets
from tests import factories

TASKS: list[Any] = [
    TextClassification(dataset="d", text=["sentence"], max_length=16),
    TextClassification(dataset="d", text=["premise", "hypothesis"], max_length=24),
    Regression(dataset="d", text=["sentence1", "sentence2"], max_length=24),
    TokenClassification(dataset="d", max_length=16),
    FillMask(dataset="d", max_length=16),
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.type} {len(task.text)}")
def test_optimum_answers_as_onnx_runtime(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = 1 if task.type == "regression" else 2
    source = factories.save(factories.model(head=task.head, labels=labels), tmp_path / "float")
    note_problem_type(source, task.problem_type)
    made = tmp_path / "made"
    made.mkdir()
    job = QuantizationJob(source, made, task.auto_class, make_dummy_inputs(source))
    BACKENDS.parse("onnx_fp16").quantize(job)
    save_tokenizer(load_tokenizer(source), made)
    found = {snippet.title: snippet for snippet in write_snippets(task, open_artifact(made), str(made))}
    printed = {}
    for title in ("ONNX Runtime", "Optimum"):
        capsys.readouterr()
        exec(found[title].code, {})
        printed[title] = [line.split() for line in capsys.readouterr().out.splitlines()]
    if task.head == "token":  # Optimum's pipeline joins the tokens of an entity
        assert len(printed["Optimum"]) == 2
    elif task.type == "regression":
        bare, optimum = ([float(line[0]) for line in printed[title]] for title in printed)
        assert bare == pytest.approx(optimum, abs=0.01)
    else:
        assert [line[0] for line in printed["Optimum"]] == [line[0] for line in printed["ONNX Runtime"]]
