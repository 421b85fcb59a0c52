"""Reports for the tests of report.html, in Python and in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.data.sequence import TextClassification
from hfcompress.measure.answers import Answer, Answers
from hfcompress.measure.measure import Measure
from hfcompress.report.judge import add_comparisons
from tests import factories
from tests.report.contents import ATTACK, plain

ROWS = 120


@pytest.fixture
def old() -> dict[str, Any]:
    return plain(
        factories.report_row("source", "source", 0.8, 10.0, 4_000_000),
        factories.report_row("01-distill", "distill", 0.76, 2.5, 1_000_000, 4.0, (3.9, 4.1), compression=4.0),
        factories.report_row("02-quantize", "quantize", 0.75, 3.5, 250_000, 2.85, (1.9, 4.0), compression=16.0),
        key="0123456789abcdef",
    )


@pytest.fixture
def compared(old: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A report whose answers were compared; its labels, texts and names are hostile."""
    labels = ["no", ATTACK, "rare"]
    references = np.array([2 if n < 6 else n % 2 for n in range(ROWS)])
    lines = [f'"{ATTACK} {n}",{references[n]},{"ab"[n % 2]}' for n in range(ROWS)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["sentence,label,part", *lines]) + "\n")
    task = TextClassification(dataset=str(tmp_path), text=["sentence"])

    def answer(wrong: set[int]) -> Answer:
        predictions = np.array([(c + 1) % 3 if n in wrong else c for n, c in enumerate(references)])
        logits = np.eye(3, dtype="float32")[predictions] * 3
        return Answer(predictions, references, logits, np.arange(ROWS) % 11 + 5)

    content = old | {"schema": 2, "name": ATTACK, "labels": labels, "machine": factories.QUIET | {"cpu": ATTACK}}
    content["machine"] |= {"cpu_flags": [], "cores": 2, "accelerator": None}
    content["rows"][1]["stage"] = ATTACK
    answers = Answers(answer({7}), (answer({0, 1, 7, 8}), answer({1, 9, *range(20, 60)})))
    return add_comparisons(content, answers, task, Measure.model_validate({"margin": "2%", "slices": ["part"]}))
