"""Code for the card that loads a model and answers with it, one snippet for each way to load it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.models.artifact import Artifact, read_config
from hfcompress.models.weights import ADAPTER, GRAPH_FILES
from hfcompress.onnx.graph_io import JAVASCRIPT_TYPES
from hfcompress.report.examples import Example, find_example
from hfcompress.utils.escape import Markdown

if TYPE_CHECKING:
    from hfcompress.data.task import Task

UNNAMED = "PATH_OR_REPO"
"""Stands for the repository in the code; `push` puts the name in."""
_PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao",),
    "gptq": ("gptqmodel", "optimum"),
    "hfcompress_int8": ("hfcompress",),
}
"""The packages that load a quantized model beside transformers, by its `quant_method`."""
_PRECISIONS = {GRAPH_FILES[dtype]: name for dtype, name in JAVASCRIPT_TYPES.items()}
"""The names of Transformers.js for the type of a graph, by the graph's file."""


@dataclass(frozen=True)
class Snippet:
    """A snippet of code.

    Attributes:
        title: The library, as a heading.
        packages: The packages that the code imports or needs, as their registry names them.
        code: The code; it runs unchanged if its `path` is an existing directory or repository.
        language: `python`, or `js`.
        note: What a user should know of it, in sentences; empty if there is nothing.
    """

    title: str
    packages: tuple[str, ...]
    code: str
    language: str = "python"
    note: str = ""

    @property
    def install(self) -> str:
        """The command that installs the packages."""
        return f"{'pip' if self.language == 'python' else 'npm'} install {shlex.join(self.packages)}"


def write_snippets(task: Task, artifact: Artifact, place: str) -> list[Snippet]:
    """Writes the code for a model, the shortest way first.

    Args:
        task: The task that the model answers.
        artifact: The model.
        place: Its directory, or its repository on the Hub.
    """
    return list(_WRITERS[artifact.runtime](task, artifact, place, find_example(task)))


def _write_torch(task: Task, artifact: Artifact, place: str, example: Example) -> Iterator[Snippet]:
    trust = ", trust_remote_code=True" if artifact.is_pruned else ""
    first = "import hfcompress  # it knows the int8 layers\n" if artifact.needs_import else ""
    packages, note = ("transformers", "torch", *_list_packages(artifact)), _explain_code(artifact)
    adapted = (artifact.path / ADAPTER).is_dir()
    if task.pipeline and not adapted:  # a pipeline does not load adapters from a subdirectory
        yield Snippet("A pipeline", packages, _spell_pipeline(task, place, example, first, trust), note=note)
        note = Markdown()
    peft = "from peft import PeftModel\n" if adapted else ""
    adapters = f'\nmodel = PeftModel.from_pretrained(model, path, subfolder="{ADAPTER}").eval()' if adapted else ""
    code = f"""{first}import torch
{peft}from transformers import {task.auto_class}, AutoTokenizer

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = {task.auto_class}.from_pretrained(path, dtype="auto"{trust}).eval(){adapters}
{_spell_batch(task, example, "pt")}.to(model.device)
with torch.inference_mode():
    output = model(**batch)
{_spell_output(task)}
{example.answers}"""
    yield Snippet(task.auto_class, (*packages, *(("peft",) if adapted else ())), code, note=note)


def _write_onnx(task: Task, artifact: Artifact, place: str, example: Example) -> Iterator[Snippet]:
    graph = find_graph(artifact)
    code = _spell_graph(
        task, place, example, library="onnxruntime",
        load=f'session = onnxruntime.InferenceSession(folder / "{graph}")',
        inputs='{node.name: batch.get(node.name, unused).astype("int64") for node in session.get_inputs()}',
        run='session.run(["logits"], inputs)[0]',
    )  # fmt: skip
    yield Snippet("ONNX Runtime", ("onnxruntime", "transformers"), code, note=_UNEQUAL)
    if task.head != "span":  # Optimum and Transformers.js expect two outputs of a model that answers questions
        yield _write_optimum(task, graph, place, example)
        yield from _write_javascript(task, graph, place, example)


def _write_openvino(task: Task, artifact: Artifact, place: str, example: Example) -> Iterator[Snippet]:
    code = _spell_graph(
        task, place, example, library="openvino",
        load=f'model = openvino.Core().compile_model(folder / "{find_graph(artifact)}", "CPU")',
        inputs='{node.any_name: batch.get(node.any_name, unused).astype("int64") for node in model.inputs}',
        run='model(inputs)["logits"]',
    )  # fmt: skip
    optimum = f"`{task.auto_class.replace('Auto', 'OV', 1)}` of optimum-intel loads the directory too."
    yield Snippet("OpenVINO", ("openvino", "transformers"), code, note=Markdown(f"{_UNEQUAL} {optimum}"))


def _spell_graph(task: Task, place: str, example: Example, library: str, load: str, inputs: str, run: str) -> str:
    """Spells the code that runs a graph on numpy arrays in a library other than torch."""
    labels = "\nid2label = {int(label): name for label, name in config['id2label'].items()}".replace("'", '"')
    answers = example.answers.replace("model.config.id2label", "id2label")
    code = f"""import json
from pathlib import Path

import {library}
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

path = "{place}"
folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path))
tokenizer = AutoTokenizer.from_pretrained(folder)
{load}
{_spell_batch(task, example, "np")}
unused = 0 * batch["input_ids"]  # for an input that the tokenizer does not make
inputs = {inputs}
logits = {run}
"""
    if "id2label" in answers:
        code += f'config = json.loads((folder / "config.json").read_text(encoding="utf-8")){labels}\n'
    else:
        code = code.removeprefix("import json\n")
    return code + answers


_UNEQUAL = Markdown(
    "The texts of a batch may differ in length: shorter ones are padded, and the mask hides the padding."
)


def _write_optimum(task: Task, graph: str, place: str, example: Example) -> Snippet:
    auto = task.auto_class.replace("AutoModel", "ORTModel", 1)
    folder, _, file = graph.rpartition("/")
    where = f'"file_name": "{file}"' + (f', "subfolder": "{folder}"' if folder else "")
    code = f"""from optimum.onnxruntime import {auto}
from transformers import AutoTokenizer, pipeline

path = "{place}"
tokenizer = AutoTokenizer.from_pretrained(path)
graph = {{{where}}}
model = {auto}.from_pretrained(path, **graph)
answer = pipeline("{task.pipeline}", model=model, tokenizer=tokenizer{_choose_strategy(task)})
{_spell_call(task, example)}"""
    return Snippet("Optimum", ("optimum-onnx[onnxruntime]",), code)


def _write_javascript(task: Task, graph: str, place: str, example: Example) -> Iterator[Snippet]:
    """Writes the code for Transformers.js: it looks for graphs in `onnx/`, and has no pipeline for pairs and scores."""
    if graph not in _PRECISIONS or not example.javascript:
        return
    code = f"""import {{ pipeline }} from "@huggingface/transformers";

const path = "{place}";
const answer = await pipeline("{task.pipeline}", path, {{ dtype: "{_PRECISIONS[graph]}" }});
console.log(await answer({example.javascript}));"""
    yield Snippet("Transformers.js", ("@huggingface/transformers",), code, "js")


def find_graph(artifact: Artifact) -> str:
    """Finds the graph of a model, relative to its directory."""
    return artifact.graph or artifact.choice.file


def _spell_pipeline(task: Task, place: str, example: Example, first: str, trust: str) -> str:
    return f"""{first}from transformers import pipeline

path = "{place}"
answer = pipeline("{task.pipeline}", model=path{_choose_strategy(task)}{trust})
{_spell_call(task, example)}"""


def _choose_strategy(task: Task) -> str:
    """Joins the tokens of an entity in a pipeline's answer."""
    return ', aggregation_strategy="simple"' if task.head == "token" else ""


def _spell_call(task: Task, example: Example) -> str:
    """Spells the call of a pipeline; texts are cut where they were cut when the model was evaluated."""
    options = f", truncation=True, max_length={task.max_length}" if task.head == "sequence" else ""
    texts = example.texts.replace("tokenizer.", "answer.tokenizer.") + "\n" if example.asked == "texts" else ""
    return f"""{texts}for found in answer({example.asked}{options}):
    print({example.shown})"""


def _spell_batch(task: Task, example: Example, tensors: str) -> str:
    """Spells the lines that tokenize texts of unequal length, as the model was evaluated."""
    truncation = f', truncation="{task.truncation}"' if isinstance(task.truncation, str) else ", truncation=True"
    options = f'padding=True{truncation}, max_length={task.max_length}, return_tensors="{tensors}"'
    return f"{example.texts}\nbatch = tokenizer({example.columns}, {options})"


def _spell_output(task: Task) -> str:
    if task.head == "span":
        return "logits = torch.stack([output.start_logits, output.end_logits], -1)"
    return "logits = output.logits"


def _list_packages(artifact: Artifact) -> tuple[str, ...]:
    quantization = read_config(artifact.path).get("quantization_config") or {}
    return _PACKAGES.get(str(quantization.get("quant_method", "")), ())


def _explain_code(artifact: Artifact) -> Markdown:
    """Explains why a model needs code that is not in transformers; empty if it needs none."""
    if artifact.is_pruned:
        return Markdown(
            "No stock config can express the heads, FFN widths and hidden width of this model. So `modeling_pruned.py` "
            "lies beside the weights, and `trust_remote_code=True` runs it: read it first. It imports torch and "
            "transformers alone. After `import hfcompress` no flag is needed."
        )
    if artifact.needs_import:
        return Markdown(
            "Transformers has no such int8 layers; `import hfcompress` adds them. No code comes with the weights."
        )
    return Markdown("")


_WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "openvino": _write_openvino}
"""By runtime."""
