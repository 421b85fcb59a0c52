"""Example texts for the code in a card, and the code that prints the answers, for each type of task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfcompress.data.task import Task


@dataclass(frozen=True)
class Example:
    """Example texts of unequal length, as Python code.

    Attributes:
        texts: The lines that assign them to variables.
        columns: The arguments that give them to a tokenizer.
        answers: The lines that print the answers, from `batch`, `logits` and `model.config.id2label`.
        asked: The argument that gives them to a pipeline.
        shown: The answer of a pipeline to one of them, `found`, as it is printed.
        javascript: The same for Transformers.js; empty if it has no such pipeline.
    """

    texts: str
    columns: str
    answers: str
    asked: str = ""
    shown: str = ""
    javascript: str = ""


_LIST = '["a charming and often affecting journey", "flat"]'
_PAIRS = """first = ["A man is playing a guitar.", "A cat sleeps."]
second = ["Someone plays music on a stage.", "A dog runs."]"""
_ASKED_PAIRS = """[
    {"text": "A man is playing a guitar.", "text_pair": "Someone plays music on a stage."},
    {"text": "A cat sleeps.", "text_pair": "A dog runs."},
]"""
_WORDS = '["Ada Lovelace was born in London.", "Marie Curie went to Paris."]'
_QUESTIONS = """questions = ["What is the man playing?", "Who sleeps?"]
contexts = ["A man is playing a guitar in front of the house.", "A cat sleeps."]"""
_LABELS = """for text, scores in zip(TEXTS, logits):
    print(model.config.id2label[int(scores.argmax())], "|", text)"""
_SCORES = """for text, score in zip(TEXTS, logits[:, 0]):
    print(float(score), "|", text)"""
_TOKENS = """for ids, mask, scores in zip(batch["input_ids"], batch["attention_mask"], logits):
    for token, label in zip(ids[mask == 1], scores[mask == 1].argmax(-1)):
        print(tokenizer.decode([int(token)]), model.config.id2label[int(label)])"""
_SPANS = """for question, ids, scores in zip(questions, batch["input_ids"], logits):
    start, end = int(scores[:, 0].argmax()), int(scores[:, 1].argmax())
    print(question, tokenizer.decode(ids[start : end + 1]))"""
_MASKS = """for ids, scores in zip(batch["input_ids"], logits):
    place = ids.tolist().index(tokenizer.mask_token_id)
    print(tokenizer.decode([int(scores[place].argmax())]))"""
_SHOWN_LABEL = """found["label"], f"{found['score']:.3f}\""""
_SHOWN_WORDS = """[(part["word"], part["entity_group"]) for part in found]"""

_EXAMPLES = {
    "token-classification": Example(f"texts = {_WORDS}", "texts", _TOKENS, "texts", _SHOWN_WORDS, _WORDS),
    "question-answering": Example(_QUESTIONS, "questions, contexts", _SPANS),
    "fill-mask": Example(
        'texts = [f"A man is playing a {tokenizer.mask_token}.", f"The {tokenizer.mask_token} sleeps."]',
        "texts",
        _MASKS,
        "texts",
        'found[0]["token_str"]',
    ),
}


def find_example(task: Task) -> Example:
    """Finds the example of a task: texts or pairs of texts for classes and scores."""
    if task.type in _EXAMPLES:
        return _EXAMPLES[task.type]
    regression = task.type == "regression"
    answers, shown = (_SCORES, 'found["score"]') if regression else (_LABELS, _SHOWN_LABEL)
    if len(task.text) == 2:
        return Example(_PAIRS, "first, second", answers.replace("TEXTS", "first"), _ASKED_PAIRS, shown)
    javascript = "" if regression else _LIST
    return Example(f"texts = {_LIST}", "texts", answers.replace("TEXTS", "texts"), "texts", shown, javascript)
