"""Proves that a user who loads a saved model and gives it plain text gets the answers that were measured.

The measured rows were encoded by the task, with a tokenizer in memory. A user has only the directory. This module
compares both on a few rows of the dev split: first the tokens of `AutoTokenizer`, then the answers of the pipeline of
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.data.task import PlainText, Task
from hfcompress.measure.process import Batch, ModelProcess
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray

    Array = NDArray[Any]

ROWS = 8
"""Number of texts that are compared."""
CANDIDATES = 64
"""Number of rows that they are chosen from."""
TOLERANCE = 1e-3
"""Largest difference of a probability, or of a score or logit relative to the largest or 1.

Kernels round differently for other lengths."""


class ReloadError(RuntimeError):
    """A saved model differs from the one in memory."""


@dataclass(frozen=True)
class Reading:
    """The task, tokenizer and labels with which a stage read its texts.

    Attributes:
        task: The stage's task.
        tokenizer: The one in memory, which training and measuring used.
        labels: The label names and ids of the task head in memory.
        rows: Raw rows.
    """

    task: Task
    tokenizer: Any
    labels: Mapping[str, int]
    rows: datasets.Dataset

    def texts(self) -> list[PlainText]:
        """Chooses a few rows of all lengths, including the shortest and the longest."""
        import numpy as np

        some = self.rows.select(range(min(CANDIDATES, len(self.rows))))
        found = sorted(
            self.task.plain_texts(some, self.tokenizer, self.labels), key=lambda text: len(text.features["input_ids"])
        )
        return [found[i] for i in sorted({*np.linspace(0, len(found) - 1, ROWS).round().astype(int)})] if found else []


def compare_plain_texts(process: ModelProcess, reading: Reading) -> dict[str, float]:
    """Compares the answers of a fresh process to plain texts with the stage's answers to the same rows.

    Args:
        process: The saved model, loaded.
        reading: How the stage read its texts.

    Returns:
        The largest difference of the pipeline's scores (of the logits, if transformers has no pipeline for the task
        or the model is a graph), and of a float model's logits in a padded batch.

    Raises:
        ReloadError: for a text that gets other tokens or another answer.
    """
    texts = reading.texts()
    if not texts:
        log.info(f"{process.artifact.path}: no dev row can be written as a plain text, so no pipeline was tried")
        return {}
    name = reading.task.pipeline if process.artifact.runtime == "torch" else None
    read = process.read([text.texts for text in texts], reading.task, name)
    for text, ids in zip(texts, read["encoded"], strict=True):
        _require_same_tokens(process, text, ids, reading.tokenizer)
    batches = [_arrays([text]) for text in texts]
    logits = [process.logits([batch])[0] for batch in batches]
    found = {}
    if read["answers"] is None:
        found["plain texts"] = 0.0  # the same ids, types and weights
    else:
        found[f"{name} pipeline"] = max(
            _difference(process, text, given, _expect_scores(name, values, text, reading))
            for text, given, values in zip(texts, read["answers"], logits, strict=True)
        )
    if process.artifact.dtype == "float32":
        found["padding"] = _padding_difference(process, texts, logits, reading.tokenizer.pad_token_id)
    return found


def _require_same_tokens(process: ModelProcess, text: PlainText, read: Mapping[str, Any], tokenizer: Any) -> None:
    for name in ("input_ids", "token_type_ids"):
        theirs, ours = read.get(name), text.features.get(name)
        if theirs == (None if ours is None else list(ours)):
            continue
        if name == "input_ids" and theirs is not None and ours is not None:
            theirs, ours = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (theirs, ours))
        raise ReloadError(
            f"{process.artifact.path}: its saved tokenizer reads row {text.number} of the dev split as "
            f"{_short(theirs)}, and it was measured as {_short(ours)} ({name})"
        )


def _short(values: Any) -> str:
    return repr(values) if values is None or len(values) <= 24 else f"{values[:24]!r} and {len(values) - 24} more"


def _arrays(texts: Sequence[PlainText], pad: int = 0) -> Batch:
    import numpy as np

    length = max(len(text.features["input_ids"]) for text in texts)
    fills = {"input_ids": pad, "token_type_ids": 0, "attention_mask": 0}
    found = {}
    for name, fill in fills.items():
        if name == "attention_mask":
            rows: list[Any] = [[1] * len(text.features["input_ids"]) for text in texts]
        elif name in texts[0].features:
            rows = [list(text.features[name]) for text in texts]
        else:
            continue
        found[name] = np.array([[*row, *[fill] * (length - len(row))] for row in rows], dtype=np.int64)
    return found


Expected = tuple[Callable[[str], float], float]
"""A function that gives the expected score of each key of an answer, and the highest expected score."""


def _expect_scores(name: Any, logits: Array, text: PlainText, reading: Reading) -> Expected:
    """Computes the scores that a pipeline should give to a text.

    Args:
        name: The pipeline's name.
        logits: The model's logits for the measured row: `(labels,)`, or `(length, labels)` for tokens.
        text: The row.
        reading: How the stage read it.
    """
    names = reading.labels
    if name == "text-classification":
        scores = logits if reading.task.problem_type == "regression" else _softmax(logits)
        return lambda label: float(scores[names[label]]) if label in names else float("nan"), float(scores.max())
    scores = _softmax(logits)
    if name == "fill-mask":
        place = list(text.features["input_ids"]).index(reading.tokenizer.mask_token_id)
        return lambda token: float(scores[place, int(token)]), float(scores[place].max())

    def at_token(key: str) -> float:
        place, _, label = key.partition(" ")
        return float(scores[int(place), names[label]]) if label in names else float("nan")

    special = reading.tokenizer.get_special_tokens_mask(
        list(text.features["input_ids"]), already_has_special_tokens=True
    )
    return at_token, float(max(row.max() for row, skip in zip(scores, special, strict=True) if not skip))


def _softmax(logits: Array) -> Array:
    import numpy as np

    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _difference(process: ModelProcess, text: PlainText, given: Mapping[str, float], expected: Expected) -> float:
    import numpy as np

    score_of, highest = expected
    scores = {key: score_of(key) for key in given}
    differences = [abs(given[key] - score) / max(1.0, abs(score)) for key, score in scores.items()]
    differences.append(abs(max(given.values()) - highest) / max(1.0, abs(highest)))
    largest = float(np.max(differences))  # nan where a label has another name
    if not largest <= TOLERANCE:
        raise ReloadError(
            f"{process.artifact.path}: a pipeline answers row {text.number} of the dev split with {_list(given)}, and "
            f"{_list(scores)} was measured"
        )
    return largest


def _list(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {score:.4g}" for key, score in [*scores.items()][:6])


def _padding_difference(process: ModelProcess, texts: Sequence[PlainText], alone: Sequence[Array], pad: int) -> float:
    """Computes the largest change of logits when rows are padded to the longest of them."""
    import numpy as np

    together = process.logits([_arrays(texts, pad)])
    largest = 0.0
    for text, one, padded in zip(texts, alone, together, strict=True):
        same = padded[: len(one)] if one.ndim > 1 else padded
        difference = float(np.abs(same - one).max()) / max(1.0, float(np.abs(one).max()))
        largest = max(largest, difference)
        if not difference <= TOLERANCE:
            raise ReloadError(
                f"{process.artifact.path} answers row {text.number} of the dev split differently (by {difference:.2g}) "
                "once it is padded to the length of another"
            )
    return largest
