"""Python code for the card that loads a model and answers with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.models.artifact import MODELING_FILE, Artifact
from hfcompress.models.weights import ADAPTER

if TYPE_CHECKING:
    from hfcompress.data.task import Task

UNNAMED = "PATH_OR_REPO"
"""Stands for the repository in the code; `push` puts the name in."""
_EXAMPLES = {
    "token-classification": '"Ada Lovelace was born in London."',
    "question-answering": '"What is the man playing?", "A man is playing a guitar."',
    "fill-mask": 'f"A man is {tokenizer.mask_token} a guitar."',
}
_ANSWERS = {
    "text-classification": "print(NAMES[int(logits[0].argmax())])",
    "regression": "print(float(logits[0, 0]))",
    "token-classification": """for token, scores in zip(batch["input_ids"][0], logits[0]):
    print(tokenizer.decode([token]), NAMES[int(scores.argmax())])""",
    "question-answering": """start, end = (int(logits[0, :, side].argmax()) for side in (0, 1))
print(tokenizer.decode(batch["input_ids"][0, start : end + 1]))""",
    "fill-mask": """place = batch["input_ids"][0].tolist().index(tokenizer.mask_token_id)
print(tokenizer.decode([int(logits[0, place].argmax())]))""",
}
"""The code that prints the answer, by task type."""


def write_snippet(task: Task, artifact: Artifact, place: str) -> str:
    """Writes the code for a model; it runs unchanged if `place` is an existing directory or repository."""
    one, two = '"a charming and often affecting journey"', '"A man is playing a guitar.", "Someone plays music."'
    example = _EXAMPLES.get(task.type, two if len(task.text) == 2 else one)
    return _SNIPPETS[artifact.runtime](artifact, task, place, example)


def _write_torch_snippet(artifact: Artifact, task: Task, place: str, example: str) -> str:
    trust = ", trust_remote_code=True" if (artifact.path / MODELING_FILE).is_file() else ""
    adapters = ""
    if (artifact.path / ADAPTER).is_dir():
        adapters = f"""
model = PeftModel.from_pretrained(model, path, subfolder="{ADAPTER}").eval()"""
    knows = "import hfcompress  # it knows the int8 layers\n" if artifact.needs_import else ""
    peft = "from peft import PeftModel\n" if adapters else ""
    return f"""{knows}import torch
{peft}from transformers import {task.auto_class}, AutoTokenizer

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = {task.auto_class}.from_pretrained(path, dtype="auto"{trust}).eval(){adapters}
batch = tokenizer({example}, return_tensors="pt").to(model.device)
with torch.inference_mode():
    output = model(**batch)
logits = {_spell_logits(task)}
{_ANSWERS[task.type].replace("NAMES", "model.config.id2label")}"""


def _spell_logits(task: Task) -> str:
    return "torch.stack([output.start_logits, output.end_logits], -1)" if task.head == "span" else "output.logits"


def _write_openvino_snippet(_artifact: Artifact, task: Task, place: str, example: str) -> str:
    auto = task.auto_class.replace("Auto", "OV", 1)
    return f"""import torch
from optimum.intel import {auto}
from transformers import AutoTokenizer

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto}.from_pretrained(path)
batch = tokenizer({example}, return_tensors="pt")
output = model(**batch)
logits = {_spell_logits(task)}
{_ANSWERS[task.type].replace("NAMES", "model.config.id2label")}"""


def _write_onnx_snippet(artifact: Artifact, task: Task, place: str, example: str) -> str:
    answer = _ANSWERS[task.type].replace("NAMES[int(", 'config["id2label"][str(')
    return f"""import json
from pathlib import Path

import onnxruntime
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

path = "{place}"
folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path))
config = json.loads((folder / "config.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(str(folder / "{artifact.graph or artifact.choice.file}"))
batch = tokenizer({example}, return_tensors="np")
names = [node.name for node in session.get_inputs()]
logits = session.run(["logits"], {{n: batch.get(n, 0 * batch["input_ids"]).astype("int64") for n in names}})[0]
{answer}"""


_SNIPPETS = {"torch": _write_torch_snippet, "onnx": _write_onnx_snippet, "openvino": _write_openvino_snippet}
"""By runtime."""
