"""The shipped recipe, from end to end: the file as it ships, with a model and data that are tiny."""

from __future__ import annotations

import json
from pathlib import Path

from hfcompress.recipe.loader import find_shipped
from tests import factories

MEASURE = "measure={latency: {rounds: 1, rows: 4, threads: 1, batch_sizes: [1, 2]}, bootstrap: 100}"


def test_optimum_onnx(teacher: Path, data: Path, tmp_path: Path) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import AutoTokenizer

    changes = [f"model={teacher}", f"task.dataset={data}", "task.config=null", "task.max_length=32", MEASURE]
    options = [argument for change in changes for argument in ("--set", change)]
    assert factories.run_cli("check", find_shipped()["optimum-onnx"], *options) == 0
    assert factories.run_cli("run", find_shipped()["optimum-onnx"], "--output", tmp_path / "run", *options) == 0

    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    _, small = report["rows"]
    assert (small["stage"], small["latency"][0]["dtype"], small["latency"][0]["runtime"]) == (
        "01-quantize",
        "int8",
        "onnxruntime",
    )
    assert small["quality"]["accuracy"] > 0.9
    final = tmp_path / "run" / "final"
    assert "optimum_onnx" in (final / "README.md").read_text(encoding="utf-8")
    assert (final / "ort_config.json").is_file()

    model = ORTModelForSequenceClassification.from_pretrained(final)
    batch = AutoTokenizer.from_pretrained(final)("the film was great", return_tensors="pt")
    assert model(**batch).logits.argmax().item() == 1
