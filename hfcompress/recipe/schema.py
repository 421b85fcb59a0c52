"""The recipe: read, overridden, validated, with every mistake at its line."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from hfcompress.context import Stage
from hfcompress.data.metrics import OF_TASK
from hfcompress.data.source import is_local, model_config, model_directory, refuse_a_path, require_weights
from hfcompress.data.tasks import AnyTask
from hfcompress.distillation.stage import Distill
from hfcompress.finetuning.stage import Finetune
from hfcompress.local_models import LocalModel, LocalModels
from hfcompress.measure.measure import Measure
from hfcompress.models.adapters import is_adapter
from hfcompress.models.artifact import label_ids, load_tokenizer
from hfcompress.models.padding import plainly_agree, reads_last_token
from hfcompress.models.shape import Shape, shape_of
from hfcompress.pruning.stage import Prune
from hfcompress.quantization.stage import Quantize
from hfcompress.recipe import document
from hfcompress.recipe.document import Document
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.card_metadata import require_hub_id, require_language, require_license
from hfcompress.utils.errors import HfcompressError, Key, Problem, did_you_mean
from hfcompress.utils.places import local_path
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task

MAX_NAME_BYTES = 200
"""A file system takes 255 bytes; endings such as `.partial` come on top."""
AnyStage = Annotated[Finetune | Distill | Prune | Quantize, Field(discriminator="kind")]


class Hub(StrictModel):
    """What the model card says of the model, and where `push` puts it."""

    repo: Annotated[str, AfterValidator(partial(require_hub_id, owner=True))] | None = None
    """Such as `user/name`; `push --repo` overrides it."""
    private: bool = False
    license: Annotated[str, AfterValidator(require_license)] = "apache-2.0"
    """A licence id of the Hub's list."""
    license_name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=96)
    """What a licence is called that is not on the list: small letters, digits, `-` and `.`; with `license: other`."""
    license_link: str | None = Field(default=None, pattern=r"^https://[^\s]+$", max_length=500)
    """The address of that licence."""
    language: list[Annotated[str, BeforeValidator(require_language)]] = ["en"]
    """ISO 639 codes, or `multilingual`, or `code`."""
    base_model: Annotated[str, AfterValidator(require_hub_id)] | None = None
    """The Hub id that the card names as base model, where the recipe's model is a local directory."""
    dataset: Annotated[str, AfterValidator(require_hub_id)] | None = None
    """The Hub id that the card names as data set, where the task's is a local directory."""

    @field_validator("license_name", "license_link")
    @classmethod
    def _of_another_license(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("license", "other") != "other":
            raise ValueError("it belongs to `license: other`; a licence of the Hub's list has a name and a link")
        return value


def require_file_name(name: str) -> str:
    """A name that a directory can have on every file system, with room for an ending.

    Raises:
        ValueError: for one that is too long, ends with a dot, or is a device of Windows.
    """
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"it has {len(name.encode())} bytes; a directory's name has at most {MAX_NAME_BYTES} here")
    if name.endswith(".") or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError("no directory can have this name on every system; choose another")
    return name


class Recipe(StrictModel):
    """A list of stages that make a model smaller, the task it is for, and how the result is measured."""

    name: Annotated[str, AfterValidator(require_file_name)] = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=96)
    """Names the run directory; letters, digits, `-`, `_` and `.`."""
    model: str = Field(min_length=1)
    """Hub id (`id@revision` picks a revision), a directory, or `builtin:quickstart`."""
    task: AnyTask
    stages: list[AnyStage] = Field(min_length=1)
    measure: Measure = Measure()
    hub: Hub = Hub()
    seed: int = Field(default=42, ge=0, lt=2**32)

    def stage_names(self) -> list[str]:
        """`01-distill`, `02-prune`, …: the stages' directories."""
        return [f"{index:02d}-{stage.kind}" for index, stage in enumerate(self.stages, start=1)]


@dataclass(frozen=True)
class Loaded:
    """A recipe and the file it came from."""

    recipe: Recipe
    document: Document

    @property
    def headline(self) -> str:
        """The file's first comment: what the recipe makes."""
        return headline(self.document.text)


def headline(text: str) -> str:
    """The first comment line of a recipe."""
    first = text.lstrip().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def recipes_directory() -> Path:
    """Where the shipped recipes lie: in the wheel, or at the top of a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(recipes_directory().glob("*.yaml"))}


def find(name: str) -> Path:
    """A recipe file, by path or by the name of a shipped one."""
    path = Path(name)
    return path if name not in shipped() or path.exists() else shipped()[name]


def load(path: Path, overrides: list[str] | None = None) -> Loaded:
    """Reads and validates a recipe.

    Args:
        path: The file.
        overrides: `KEY.PATH=VALUE` assignments, applied in order.

    Raises:
        HfcompressError: with every mistake in it.
    """
    read = document.read(path)
    for assignment in overrides or []:
        read = document.override(read, assignment)
    return validate(read)


def validate(read: Document) -> Loaded:
    """The recipe that a document holds.

    Raises:
        HfcompressError: with every mistake in it.
    """
    try:
        return Loaded(Recipe.model_validate(read.data, by_alias=True, by_name=False), read)
    except ValidationError as error:
        schema = [_problem(read, details) for details in error.errors(include_url=False)]
        raise HfcompressError([*schema, *_task_problems(read)]) from None


def _task_problems(read: Document) -> list[Problem]:
    """What is wrong with the data of a recipe whose other parts are not valid: said at once, not at the next try."""
    try:
        task: Task = TypeAdapter(AnyTask).validate_python(read.data.get("task"))
    except ValidationError:
        return []
    return [replace(p, where=read.where(p.key)) for p in task.problems()]


_TAGS = {"finetune", "distill", "prune", "quantize", *OF_TASK}


def _problem(read: Document, details: Any) -> Problem:
    key = _recipe_key(details["loc"], read.data)
    message = str(details["msg"]).removeprefix("Value error, ")
    if details["type"] == "union_tag_not_found":
        message = f"'{details['ctx']['discriminator'].strip(chr(39))}' is missing"
    elif details["type"] == "union_tag_invalid":
        name, tag = details["ctx"]["discriminator"].strip("'"), details["ctx"]["tag"]
        hint = did_you_mean(tag, re.findall(r"'([^']+)'", details["ctx"]["expected_tags"]))
        key, message = (*key, name), f"unknown {name} '{tag}'; {hint}"
    elif details["type"] == "missing":
        message = "this key is required"
    elif details["type"] not in ("unknown_key", "invalid", "value_error"):
        message = f"{message}, not {details['input']!r}" if _short(details["input"]) else message
    return Problem(message, "", key, read.where(key))


def _short(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None))) and len(repr(value)) < 60


def _recipe_key(location: tuple[Any, ...], data: Any) -> Key:
    """Pydantic's location without the tags of its unions, which the file does not spell."""
    key: list[str | int] = []
    for part in location:
        inside = isinstance(data, dict) and part in data
        if part in _TAGS and not inside:
            continue
        key.append(part)
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            data = None
    return tuple(key)


def check(loaded: Loaded, weights: bool = True, download: bool = False) -> list[Shape]:
    """Looks for what cannot work, before anything is trained.

    Args:
        loaded: The recipe.
        weights: Also require that the model has weights and this machine what the stages run on, and read the labels
            of local data; `plan` needs none of it.
        download: Read the labels of a Hub data set too.

    Returns:
        The model's shape, then the shape after each stage.

    Raises:
        HfcompressError: with everything that was found.
    """
    recipe, problems = loaded.recipe, list(loaded.recipe.task.problems())
    for index, stage in enumerate(recipe.stages):
        problems += _stage_order(index, recipe)
        problems += [replace(p, key=("stages", index, *p.key)) for p in (stage.unavailable() if weights else [])]
    problems += [*_extras(recipe)]
    shapes: list[Shape] = []
    try:
        config = model_config(recipe.model)
        problems += [] if _trains_head(recipe) else recipe.task.head_problems(config)
        shapes = _planned(recipe, config, shape_of(config, head=recipe.task.head), problems)
        readable = not any(p.key[:2] in (("task", "dataset"), ("task", "text"), ("task", "label")) for p in problems)
        if readable and (download or (weights and is_local(recipe.task.dataset))):
            problems += recipe.task.label_problems(None if _trains_head(recipe) else label_ids(config))
        if weights:
            require_weights(recipe.model)
            problems += _padding_problems(recipe, download)
        if weights and not problems:
            problems += _local_problems(recipe, readable=readable, download=download)
    except HfcompressError as error:
        problems += [replace(p, key=p.key or ("model",)) for p in error.problems]
    if problems:
        raise HfcompressError(replace(p, where=p.where or loaded.document.where(p.key)) for p in problems)
    return shapes


def _local_problems(recipe: Recipe, readable: bool, download: bool) -> list[Problem]:
    """What configs, tokenizers and the first rows say of each stage, of what lies on this machine."""
    found = list[Problem]()
    model = _local(recipe.model, recipe.task)
    named = {"model": model, "source": model} if model else {}
    parent = model
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        task = stage.task_of(recipe.task)
        there = {spec: local for spec in stage.specs().values() if (local := _local(spec, task))}
        here = {**there, **named, **({"parent": parent} if parent else {})}
        first = model.directory if model and task is recipe.task else None
        models = LocalModels(task, here, readable and (download or is_local(task.dataset)), first)
        found += [replace(p, key=("stages", index, *p.key)) for p in stage.local_problems(models)]
        parent = _made(stage, here.get(stage.starts_from), models)
        changed = {name: parent} | ({} if stage.compresses else {"source": parent})
        named = {spec: local for spec, local in {**named, **changed}.items() if local}
    return found


def _local(spec: str, task: Task) -> LocalModel | None:
    """A model on this machine, adapters excepted."""
    if not is_local(spec) or not (model_directory(spec) / "config.json").is_file():
        return None
    config = model_config(spec)
    return LocalModel(model_directory(spec), label_ids(config) if has_task_head(config, task) else None, config)


def _made(stage: Stage, start: LocalModel | None, models: LocalModels) -> LocalModel | None:
    """What a stage makes of a model, as far as it is known: its tokenizer and labels."""
    if start is None:
        return None
    labels = start.labels
    if isinstance(stage, Distill):
        source = models.named.get("source")
        labels = source.labels if source else None
    elif isinstance(stage, Finetune):
        labels = stage.labels_of(start, models) if models.readable else None
    return LocalModel(start.directory, labels)


def _padding_problems(recipe: Recipe, download: bool) -> list[Problem]:
    """Models whose config and tokenizer do not agree on what pads, where an answer may depend on it.

    A Hub model's tokenizer is looked at once it may be fetched.
    """
    named: dict[str, Key] = {recipe.model: ("model",)}
    inside = {"source", "parent", "model", *recipe.stage_names()}
    for index, stage in enumerate(recipe.stages):
        specs = {spec: ("stages", index, *key) for key, spec in stage.specs().items() if spec not in inside}
        named = specs | named
    found: list[Problem] = []
    for spec, key in named.items():
        try:
            path = model_directory(spec) if download or is_local(spec) else None
            if path is None or is_adapter(path):
                continue
            config = model_config(spec)
            if reads_last_token(config) and not plainly_agree(path, config):
                load_tokenizer(path)
        except HfcompressError as error:
            found += [replace(p, key=key) for p in error.problems]
    return found


def _trains_head(recipe: Recipe) -> bool:
    """Whether the recipe makes its own head, instead of taking the model's."""
    return any(isinstance(stage, Finetune) and stage.train.epochs > 0 for stage in recipe.stages)


def _source_problems(recipe: Recipe, config: Mapping[str, Any]) -> list[Problem]:
    """That the model has no head for the task, and no stage makes one: it is measured, and teaches."""
    named = config.get("architectures")
    if not named or has_task_head(config, recipe.task) or _trains_head(recipe):
        return []
    message = f"the model is a {named[0]}, it has no head for {recipe.task.type}"
    there = isinstance(recipe.stages[0], Finetune)
    fix = "train it in its `finetune` stage" if there else "put a `finetune` stage first"
    return [Problem(message, f"{fix}, or name a model that was fine-tuned", ("model",))]


def _planned(recipe: Recipe, config: Mapping[str, Any], model: Shape, problems: list[Problem]) -> list[Shape]:
    shapes = [model]
    outputs = recipe.task.outputs
    if outputs is not None and model.labels != outputs and not _trains_head(recipe):
        message = f"the model's head has {model.labels} outputs, a {recipe.task.type} task needs {outputs}"
        problems.append(Problem(message, "put a `finetune` stage first", ("model",)))
    problems += _source_problems(recipe, config)
    problems += _length_problems(recipe.task, model, ("task",))
    known = {"model": model, "source": model}
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        task = stage.task_of(recipe.task)
        specs = stage.specs()
        known = {**{spec: s for spec in specs.values() if (s := _known_shape(spec))}, **known, "parent": shapes[-1]}
        # A student starts from the model it names, with the head of the stage's task.
        start = known.get(specs.get(("student", "from"), "parent"), shapes[-1])
        if start.head != task.head and stage.kind in ("prune", "quantize"):
            message = f"the model that {stage.kind} gets here has no head for {task.type}"
            fix = "put a `distill` stage on the recipe's task before it"
            problems.append(Problem(message, fix, ("stages", index)))
        if ("student", "from") in specs and task is recipe.task and start is not known["model"]:
            problems += _length_problems(task, start, ("task",))
        if task is not recipe.task:
            problems += _length_problems(task, start, ("stages", index, "task"))
            if task.head not in start.spec.task_head_kinds:
                message = f"no {start.architecture} model has a head for {task.type}"
                problems.append(Problem(message, "give the stage another type of task", ("stages", index, "task")))
        start = replace(start, head=task.head, labels=_labels(task, start, known["source"]))
        found = stage.problems(start, known, task)
        problems += [replace(p, key=("stages", index, *p.key)) for p in found]
        shapes.append(stage.plan(start) if not found else start)
        if not stage.compresses:
            labels = recipe.task.head_labels() if _trains_head(recipe) else None
            shapes[-1] = known["source"] = replace(shapes[-1], labels=labels or shapes[-1].labels)
        known[name] = shapes[-1]
    return shapes


def _length_problems(task: Task, model: Shape, key: Key) -> list[Problem]:
    limit = model.usable_positions
    if task.max_length <= limit:
        return []
    message = f"max_length is {task.max_length}, wider than the model's position table allows ({limit})"
    return [Problem(message, f"set it to {limit} or less", (*key, "max_length"))]


def _labels(task: Task, start: Shape, source: Shape) -> int:
    """Outputs of a stage's head: the source's where the task is the same, since a student answers what it does."""
    return source.labels if source.head == task.head else task.head_labels() or start.labels


def _known_shape(spec: str) -> Shape | None:
    """The shape of a local directory that a stage names; None for a stage, a Hub id, or where there is no config."""
    if not is_local(spec) or not (local_path(spec) / "config.json").is_file():
        return None
    try:
        return shape_of(model_config(spec))
    except HfcompressError:
        return None


def _stage_order(index: int, recipe: Recipe) -> list[Problem]:
    stage, key = recipe.stages[index], ("stages", index)
    found = []
    if not stage.compresses and any(s.compresses for s in recipe.stages[:index]):
        found.append(Problem("finetune makes the source, so it comes first", "move it to the top", key))
    if index == len(recipe.stages) - 1 and stage.task_of(recipe.task) is not recipe.task:
        message = "the recipe ends with a model for another task than its own"
        found.append(Problem(message, "add a `distill` stage on the recipe's task after it", (*key, "task")))
    if any(s.kind == "quantize" for s in recipe.stages[:index]):
        found.append(Problem(f"{stage.kind} cannot follow quantize", "put quantize last", key))
    return found + [replace(p, key=(*key, *p.key)) for p in _named_problems(index, recipe)]


def _named_problems(index: int, recipe: Recipe) -> list[Problem]:
    found: list[Problem] = []
    for key, spec in recipe.stages[index].specs().items():
        found += _spec_problems(spec, key, index, recipe.stage_names())
    return found


def _spec_problems(spec: str, key: Key, index: int, names: list[str]) -> list[Problem]:
    inside, what = ["source", "parent", "model", *names[:index]], "teacher" if "teacher" in key else "model"
    if spec in inside or is_local(spec):
        return []
    if spec in names:
        return [Problem(f"the {what} {spec} is not made yet at this stage", "name an earlier one", key)]
    if re.fullmatch(r"\d\d-\w+", spec):
        return [Problem(f"the recipe has no stage {spec}", did_you_mean(spec, inside), key)]
    try:
        refuse_a_path(spec, what)
    except HfcompressError as error:
        return [replace(p, key=key) for p in error.problems]
    return []


def _extras(recipe: Recipe) -> list[Problem]:
    if recipe.measure.energy and importlib.util.find_spec("codecarbon") is None:
        return [Problem("codecarbon is not installed", "pip install 'hfcompress[energy]'", ("measure", "energy"))]
    return []


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default spelled out."""
    return {**recipe.model_dump(mode="json"), "stages": [stage_options(stage) for stage in recipe.stages]}


def stage_options(stage: Stage) -> dict[str, Any]:
    """A stage with every default spelled out, components by name."""
    from hfcompress.utils.registry import Component

    def spelled(value: Any) -> Any:
        if isinstance(value, Component):
            return value.spelled()
        if isinstance(value, StrictModel):
            fields = type(value).model_fields.items()
            return {field.alias or name: spelled(getattr(value, name)) for name, field in fields}
        return [spelled(entry) for entry in value] if isinstance(value, list) else value

    options: dict[str, Any] = spelled(stage)
    return options


def dumped(value: Any) -> str:
    """A value as YAML, for people."""
    return yaml.safe_dump(value, sort_keys=False, width=120)
