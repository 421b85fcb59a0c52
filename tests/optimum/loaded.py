"""A directory as Optimum's users load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfcompress.models.architectures import TASK_HEADS

CLASSES = {
    "sequence": "ORTModelForSequenceClassification",
    "token": "ORTModelForTokenClassification",
    "span": "ORTModelForQuestionAnswering",
    "mask": "ORTModelForMaskedLM",
}


def auto_class(head: str) -> str:
    return "AutoModel" + TASK_HEADS[head]


def answers(path: Path, head: str, probe: Any) -> Any:
    """The logits of Optimum's class for the head, as arrays; of a span head `(rows, length, 2)`."""
    import numpy as np
    import optimum.onnxruntime

    model = getattr(optimum.onnxruntime, CLASSES[head]).from_pretrained(path)
    output = model(**probe)
    return np.stack([output.start_logits, output.end_logits], -1) if head == "span" else output.logits
