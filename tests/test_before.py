"""What earlier versions wrote loads, and their unfinished runs go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.measure.environment import versions
from hfcompress.report import report
from tests import factories

pytestmark = pytest.mark.usefixtures("in_process")

BEFORE = Path(__file__).parent / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))


def _encoded(path: Path, kind: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)(EXPECTED["rows"], padding=True, return_tensors=kind)


def _torch_logits(path: Path) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    import hfcompress.models.artifact  # noqa: F401  # makes `hfcompress_int8` known to transformers

    model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
    if (path / "adapter").is_dir():
        model.load_adapter(str(path / "adapter"))
    with torch.no_grad():
        return model(**_encoded(path, "pt")).logits.float().numpy()


def _graph_logits(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path / "model.onnx"))
    found = _encoded(path, "np")
    zeros = np.zeros_like(found["input_ids"])
    return session.run(None, {i.name: found.get(i.name, zeros).astype("int64") for i in session.get_inputs()})[0]


@pytest.mark.parametrize(
    ("name", "logits", "tolerance"),
    [
        ("pruned/01-prune", _torch_logits, 1e-4),
        ("torch_int8/01-quantize", _torch_logits, 0.05),
        ("qlora/01-quantize", _torch_logits, 1e-2),
        ("qat/01-quantize", _graph_logits, 0.05),
    ],
)
def test_a_model_of_an_earlier_version_answers_as_it_did(name: str, logits: Any, tolerance: float) -> None:
    found = logits(BEFORE / "written" / name)
    np.testing.assert_allclose(found, EXPECTED["logits"][name.partition("/")[0]], atol=tolerance)


def test_a_graph_beside_its_config_is_found_weighed_and_published(tmp_path: Path) -> None:
    from hfcompress.models.artifact import open_artifact, weights_hash
    from hfcompress.run.push import list_uploads

    made = tmp_path / "qat"
    shutil.copytree(BEFORE / "written" / "qat" / "01-quantize", made)
    artifact = open_artifact(made)
    assert artifact.weight_files == [made / "model.onnx"]
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    assert {"model.onnx", "config.json", "README.md"} <= {file.name for file in list_uploads(made)}
    before = weights_hash(made)
    (made / "onnx").mkdir()
    (made / "model.onnx").rename(made / "onnx" / "model.onnx")
    assert weights_hash(made) == before  # it is the same model in its new place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of everything, in a directory in which commands run."""
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def _same_versions(run: Path) -> bool:
    import torch

    lock = json.loads((run / "recipe.lock.json").read_text(encoding="utf-8"))
    return bool(lock["environment"]["versions"] == versions()) and not torch.cuda.is_available()


def test_an_unfinished_run_of_an_earlier_version_goes_on(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = place / "written" / "unfinished"
    same = _same_versions(run)
    first = (run / "01-distill" / "model.safetensors").read_bytes()
    assert factories.run_cli("run", "unfinished.yaml", "--output", run) == 0
    said = "".join(capfd.readouterr())
    assert ("01-distill: done before" in said) is same  # else other versions are at work: it is made anew
    if same:
        assert (run / "01-distill" / "model.safetensors").read_bytes() == first
        assert "prune: scoring" not in said  # it was cut before, and the checkpoint is of the training after that
    assert [row["stage"] for row in json.loads((run / "report.json").read_text(encoding="utf-8"))["rows"]] == [
        "source", "01-distill", "02-prune",
    ]  # fmt: skip


def test_a_finished_run_of_an_earlier_version_is_read(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = place / "written" / "pruned"
    same = _same_versions(run)
    assert factories.run_cli("report", run) == 0
    assert factories.run_cli("card", run) == 0
    weights = (run / "01-prune" / "model.safetensors").read_bytes()
    assert factories.run_cli("run", "pruned.yaml", "--output", run) == 0
    # Its models stay; they are measured again, because a report of today also compares their answers.
    assert ("01-prune: done before" in "".join(capfd.readouterr())) is same
    assert json.loads((run / "report.json").read_text())["schema"] == report.SCHEMA
    assert not same or (run / "01-prune" / "model.safetensors").read_bytes() == weights
