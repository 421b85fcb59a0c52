"""The model card: the report, written for people, with the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import is_local
from hfcompress.measure.process import has_int8_layers
from hfcompress.models.artifact import MODELING_FILE, Artifact
from hfcompress.models.weights import ADAPTER
from hfcompress.recipe.loader import Loaded
from hfcompress.report import report
from hfcompress.report.sections import list_sections
from hfcompress.utils.card_metadata import require_hub_id, require_language, require_license
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import Markdown, code, fenced, markdown, one_line
from hfcompress.utils.places import name_of, without_places
from hfcompress.utils.wording import significant

if TYPE_CHECKING:
    from hfcompress.data.task import Task

UNNAMED = "PATH_OR_REPO"
"""Stands in the snippet until `push` knows the repository."""
METRIC_NAMES = {
    "accuracy": "Accuracy", "f1": "F1", "matthews_correlation": "Matthews correlation", "pearson": "Pearson",
    "spearman": "Spearman", "mse": "Mean squared error", "precision": "Precision", "recall": "Recall",
    "exact_match": "Exact match", "perplexity": "Perplexity",
}  # fmt: skip
PIPELINES = {"regression": "text-classification"}
"""What the Hub calls a task, where it has no name of ours for it."""
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
"""What the snippet prints, by task."""


def render(loaded: Loaded, content: Mapping[str, Any], artifact: Artifact) -> str:
    """The README.md of a model; every figure in it is read from the report.

    Args:
        loaded: The recipe, embedded verbatim.
        content: The report.
        artifact: The model that the card stands beside; its row is the last that has its stage.
    """
    row = next(row for row in content["rows"] if row["stage"] == artifact.stage)
    metadata = Markdown(_metadata(loaded, content, row, artifact).to_yaml())
    template = _environment().get_template("card.md")
    text = template.render(card_data=metadata, **_sections(loaded, content, row, artifact)).strip() + "\n"
    validate(text)
    return text


def _environment() -> Any:
    """Jinja, made so that every value is shown literally that is not Markdown on purpose."""
    from jinja2 import Environment, FileSystemLoader

    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(loader=templates, finalize=markdown, keep_trailing_newline=True)
    made.filters["code"] = code
    made.filters["paragraphs"] = lambda facts: Markdown("\n\n".join(map(markdown, facts)))
    return made


def _metadata(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], artifact: Artifact) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    recipe, metric = loaded.recipe, report.metric_of(content)
    languages = recipe.hub.language
    base, dataset = base_model(loaded), dataset_name(loaded)
    local = is_local(recipe.task.dataset)
    result = EvalResult(
        task_type=PIPELINES.get(recipe.task.type, recipe.task.type),
        dataset_type=dataset or "local",
        dataset_name=one_line(" ".join(filter(None, [dataset or name_of(recipe.task.dataset), recipe.task.config]))),
        dataset_config=recipe.task.config and one_line(recipe.task.config),
        # Local files called `test` need not be the Hub's test split.
        dataset_split=None if local and recipe.hub.dataset else content["task"]["split"],
        metric_type=metric,
        metric_name=METRIC_NAMES.get(metric, metric),
        metric_value=round(float(row["quality"][metric]), 6),
    )
    stages = _stages_behind(loaded, artifact)
    tags = ["hfcompress", *dict.fromkeys(stage.tag for stage in stages if stage.tag)]
    return ModelCardData(
        language=(languages[0] if len(languages) == 1 else languages) or None,
        license=recipe.hub.license,
        license_name=recipe.hub.license_name,
        license_link=recipe.hub.license_link,
        library_name="onnx" if artifact.runtime == "onnx" else "transformers",
        pipeline_tag=PIPELINES.get(recipe.task.type, recipe.task.type),
        base_model=base,
        base_model_relation=stages[-1].relation if base else None,
        datasets=[dataset] if dataset else None,
        metrics=[metric],
        tags=tags,
        model_name=recipe.name,
        eval_results=[result],
    )


def _stages_behind(loaded: Loaded, artifact: Artifact) -> list[Any]:
    """The stages that made the model: `--only` ends before the last."""
    names, stages = loaded.recipe.stage_names(), loaded.recipe.stages
    if artifact.stage in names:
        return list(stages[: names.index(artifact.stage) + 1])
    return [stage for stage in stages if not stage.compresses]


def base_model(loaded: Loaded) -> str | None:
    """The Hub id of the model that this one comes from, where there is one."""
    return loaded.recipe.hub.base_model or _hub_id(loaded.recipe.model)


def dataset_name(loaded: Loaded) -> str | None:
    """The Hub id of the data set, where there is one."""
    return loaded.recipe.hub.dataset or _hub_id(loaded.recipe.task.dataset)


def _hub_id(spec: str) -> str | None:
    """The id that a model or a data set was named by; None for a directory, also one that is gone by now."""
    try:
        return None if is_local(spec) else require_hub_id(spec.partition("@")[0])
    except ValueError:
        return None


def _sections(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], artifact: Artifact) -> dict[str, Any]:
    from hfcompress import __version__

    metric, source = report.metric_of(content), content["rows"][0]
    base = source["quality"][metric]
    return {
        "name": loaded.recipe.name,
        "version": __version__,
        "base": base_model(loaded) or name_of(loaded.recipe.model),
        "row": row,
        "source": source,
        "metric": METRIC_NAMES.get(metric, metric).lower(),
        "value": row["quality"][metric],
        "low": row["quality_interval"][0],
        "high": row["quality_interval"][1],
        "n": row["quality"]["n"],
        "share": row["quality"][metric] / base if base else None,
        "mb": lambda count: significant(count / 1e6),
        "busy": report.busy(content),
        "measure_again": Markdown(report.measure_again(content)),
        "speeds": []
        if report.busy(content)
        else [Markdown(_speed(entry)) for entry in row["latency"] if entry["speedup"]],
        "table": Markdown(report.as_markdown(content).partition("\n\n")[0]),
        "conditions": report.conditions_as_markdown(content),
        "made": [stage.describe() for stage in _stages_behind(loaded, artifact)],
        "sections": list(list_sections(content, artifact.path)),
        "limits": _limits(loaded, artifact),
        "plot": (artifact.path / "tradeoff.png").is_file(),
        "recipe": fenced(without_places(loaded.document.text).rstrip("\n"), "yaml"),
        "overrides": [_published(assignment) for assignment in loaded.document.overrides],
        "snippet": fenced(snippet(loaded, artifact, loaded.recipe.hub.repo or UNNAMED), "python"),
        "dataset": dataset_name(loaded) or name_of(loaded.recipe.task.dataset),
        "language": ", ".join(loaded.recipe.hub.language),
        "remote_code": (artifact.path / MODELING_FILE).is_file() and artifact.runtime == "torch",
    }


def _limits(loaded: Loaded, artifact: Artifact) -> list[str]:
    """What a user should know before relying on the model."""
    found = [
        f"It was evaluated on one data set, with at most {loaded.recipe.task.max_length} tokens a text. Evaluate it on "
        "your own data.",
        "It inherits the knowledge and the biases of its source and its data. A smaller model can get worse on rare "
        "cases first, which an average does not show.",
        "Speed depends on processor, batch size and length. The figures above are ratios on one machine.",
    ]
    if artifact.dtype == "int8" and artifact.runtime == "onnx":
        found.append(
            "int8 is fast on processors that multiply int8 (AVX512-VNNI, AMX, ARM dot product); others gain less."
        )
    return found + _stages_behind(loaded, artifact)[-1].limits()


def _speed(entry: Mapping[str, Any]) -> str:
    """How many times faster or slower the model is at a batch size; with its interval where that is not narrow."""
    faster, factor, ends = entry["speedup"] >= 1, entry["speedup"], entry.get("speedup_interval")
    if not faster:
        factor, ends = 1 / factor, ends and [1 / end for end in reversed(ends)]
    interval = f" ({'-'.join(map(report.ratio, ends))})" if ends and not entry["narrow"] else ""
    return f"**{factor:.1f}x**{interval} {'faster' if faster else 'slower'} at batch {entry['batch_size']}"


def _published(assignment: str) -> str:
    """`KEY=VALUE`, where places on this machine are their names alone."""
    key, _, value = assignment.partition("=")
    return f"{key}={without_places(value)}"


def snippet(loaded: Loaded, artifact: Artifact, place: str) -> str:
    """Python that loads the model and answers; it runs as it stands once `place` is a real path or repository."""
    task = loaded.recipe.task
    one, two = '"a charming and often affecting journey"', '"A man is playing a guitar.", "Someone plays music."'
    example = _EXAMPLES.get(task.type, two if len(task.text) == 2 else one)
    return _SNIPPETS[artifact.runtime](artifact, task, place, example)


def _torch_snippet(artifact: Artifact, task: Task, place: str, example: str) -> str:
    trust = ", trust_remote_code=True" if (artifact.path / MODELING_FILE).is_file() else ""
    adapters = ""
    if (artifact.path / ADAPTER).is_dir():
        adapters = f"""
model = PeftModel.from_pretrained(model, path, subfolder="{ADAPTER}").eval()"""
    knows = "import hfcompress  # it knows the int8 layers\n" if has_int8_layers(artifact) else ""
    peft = "from peft import PeftModel\n" if adapters else ""
    return f"""{knows}import torch
{peft}from transformers import {task.auto_class}, AutoTokenizer

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = {task.auto_class}.from_pretrained(path, dtype="auto"{trust}).eval(){adapters}
batch = tokenizer({example}, return_tensors="pt").to(model.device)
with torch.inference_mode():
    output = model(**batch)
logits = {_logits(task)}
{_ANSWERS[task.type].replace("NAMES", "model.config.id2label")}"""


def _logits(task: Task) -> str:
    return "torch.stack([output.start_logits, output.end_logits], -1)" if task.head == "span" else "output.logits"


def _openvino_snippet(_artifact: Artifact, task: Task, place: str, example: str) -> str:
    auto = task.auto_class.replace("Auto", "OV", 1)
    return f"""import torch
from optimum.intel import {auto}
from transformers import AutoTokenizer

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto}.from_pretrained(path)
batch = tokenizer({example}, return_tensors="pt")
output = model(**batch)
logits = {_logits(task)}
{_ANSWERS[task.type].replace("NAMES", "model.config.id2label")}"""


def _onnx_snippet(artifact: Artifact, task: Task, place: str, example: str) -> str:
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
session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
batch = tokenizer({example}, return_tensors="np")
names = [node.name for node in session.get_inputs()]
logits = session.run(["logits"], {{n: batch.get(n, 0 * batch["input_ids"]).astype("int64") for n in names}})[0]
{answer}"""


_SNIPPETS = {"torch": _torch_snippet, "onnx": _onnx_snippet, "openvino": _openvino_snippet}
"""By what runs the model."""


def validate(text: str) -> None:
    """Holds a card against what the Hub would refuse, without asking it.

    Raises:
        HfcompressError: for a licence, language, pipeline or metric value that the Hub does not take.
    """
    import math

    from huggingface_hub import ModelCard

    data: Any = ModelCard(text).data
    problems = []
    languages = data.language if isinstance(data.language, list) else [data.language]
    datasets = data.datasets or []
    proofs: list[tuple[str, Callable[[Any], object], list[Any]]] = [
        ("license", require_license, [data.license]),
        ("language", require_language, languages if data.language else []),
        ("base_model", require_hub_id, [data.base_model] if data.base_model else []),
        ("dataset", require_hub_id, [datasets] if isinstance(datasets, str) else datasets),
    ]
    for key, require, values in proofs:
        for value in values:
            try:
                require(str(value))
            except ValueError as error:
                problems.append(f"hub.{key}: {error}")
    for result in data.eval_results or []:
        if type(result.metric_value) is not float or not math.isfinite(result.metric_value):
            problems.append(f"the metric {result.metric_type} has the value {result.metric_value!r}")
    if "[More Information Needed]" in text:
        problems.append("the card has an empty section")
    if problems:
        raise HfcompressError("the model card would be refused: " + "; ".join(problems), "fix `hub:` in the recipe")
