"""Finds what cannot work in a recipe before anything is trained: the order of stages, names, shapes, files.

In a rule's message `{stage}`, `{task}` and `{architecture}` stand for the stage's.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.data.local_models import LocalModel, LocalModels
from hfcompress.data.source import is_local, model_config, model_directory, refuse_a_path, require_weights
from hfcompress.distillation.stage import Distill
from hfcompress.finetuning.stage import Finetune
from hfcompress.models.adapters import is_adapter
from hfcompress.models.artifact import label_ids, load_tokenizer
from hfcompress.models.padding import have_same_pad_token, reads_last_token
from hfcompress.models.shape import Shape, shape_of
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError, Key, Problem, Rule, did_you_mean
from hfcompress.utils.places import local_path

if TYPE_CHECKING:
    from hfcompress.context import Stage
    from hfcompress.data.task import Task
    from hfcompress.recipe.loader import Loaded
    from hfcompress.recipe.schema import Recipe


@dataclass(frozen=True)
class Place:
    """A stage at its place in a recipe, and the model that it gets there.

    Attributes:
        recipe: The recipe.
        index: The number of the stage, from 0.
        start: The shape of the model that the stage starts from; None before shapes are known.
    """

    recipe: Recipe
    index: int
    start: Shape | None = None

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.recipe.stages[self.index]

    @property
    def earlier(self) -> list[Stage]:
        """The stages before it."""
        return list(self.recipe.stages[: self.index])

    @property
    def task(self) -> Task:
        """The stage's task."""
        return self.stage.task_of(self.recipe.task)

    @property
    def has_own_task(self) -> bool:
        """True if the stage has another task than the recipe."""
        return self.task is not self.recipe.task

    @property
    def is_last(self) -> bool:
        """True for the last stage."""
        return self.index == len(self.recipe.stages) - 1


ORDER: tuple[Rule[Place], ...] = (
    Rule(
        when=lambda at: not at.stage.compresses and any(stage.compresses for stage in at.earlier),
        message="finetune makes the source, so it comes first",
        fix="move it to the top",
    ),
    Rule(
        when=lambda at: at.is_last and at.has_own_task,
        message="the recipe ends with a model for another task than its own",
        fix="add a `distill` stage on the recipe's task after it",
        key=("task",),
    ),
    Rule(
        when=lambda at: any(stage.ends_recipe for stage in at.earlier),
        message="{stage} cannot follow quantize",
        fix="put quantize last",
    ),
)
"""The order of the stages, whatever model the recipe names."""
START: tuple[Rule[Place], ...] = (
    Rule(
        when=lambda at: at.start is not None and at.start.head != at.task.head and not at.stage.makes_task_head,
        message="the model that {stage} gets here has no head for {task}",
        fix="put a `distill` stage on the recipe's task before it",
    ),
    Rule(
        when=lambda at: at.start is not None and at.has_own_task and at.task.head not in at.start.spec.task_head_kinds,
        message="no {architecture} model has a head for {task}",
        fix="give the stage another type of task",
        key=("task",),
    ),
)
"""The task head of the model that a stage starts from."""


def apply_rules(rules: tuple[Rule[Place], ...], at: Place) -> list[Problem]:
    """Returns a problem for each rule that refuses a stage, with key paths inside the recipe."""
    words = {
        "stage": at.stage.kind,
        "task": at.task.type,
        "architecture": at.start.architecture if at.start else "",
    }
    return [
        Problem(rule.message.format(**words), rule.fix, ("stages", at.index, *rule.key))
        for rule in rules
        if rule.when(at)
    ]


def check(loaded: Loaded, weights: bool = True, download: bool = False) -> list[Shape]:
    """Finds what cannot work, before anything is trained.

    Args:
        loaded: The recipe.
        weights: Also require the weights of the model and the packages that the stages run on, and read the labels of
            local data. `plan` needs none of it.
        download: Also read the labels of a data set on the Hub.

    Returns:
        The shape of the model, then the shape after each stage.

    Raises:
        HfcompressError: with everything that was found.
    """
    recipe, problems = loaded.recipe, list(loaded.recipe.task.problems())
    for index, stage in enumerate(recipe.stages):
        problems += apply_rules(ORDER, Place(recipe, index))
        found = _unknown_names(index, recipe) + (stage.unavailable() if weights else [])
        problems += [_within_stage(index, problem) for problem in found]
    problems += _missing_extras(recipe)
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


def _within_stage(index: int, problem: Problem) -> Problem:
    return replace(problem, key=("stages", index, *problem.key))


def _local_problems(recipe: Recipe, readable: bool, download: bool) -> list[Problem]:
    """The problems that the configs, tokenizers and first rows on this machine show."""
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
        found += [_within_stage(index, problem) for problem in stage.local_problems(models)]
        parent = _local_result(stage, here.get(stage.starts_from), models)
        changed = {name: parent} | ({} if stage.compresses else {"source": parent})
        named = {spec: local for spec, local in {**named, **changed}.items() if local}
    return found


def _local(spec: str, task: Task) -> LocalModel | None:
    """The model that a name stands for, if it is on this machine and no adapter."""
    if not is_local(spec) or not (model_directory(spec) / "config.json").is_file():
        return None
    config = model_config(spec)
    return LocalModel(model_directory(spec), label_ids(config) if has_task_head(config, task) else None, config)


def _local_result(stage: Stage, start: LocalModel | None, models: LocalModels) -> LocalModel | None:
    """The model that a stage will make, as far as it is known: tokenizer and labels."""
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
    """Models whose config and tokenizer name different pad tokens, if an answer may depend on it.

    The tokenizer of a model on the Hub is only read if `download` allows it.
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
            if reads_last_token(config) and not have_same_pad_token(path, config):
                load_tokenizer(path)
        except HfcompressError as error:
            found += [replace(p, key=key) for p in error.problems]
    return found


def _trains_head(recipe: Recipe) -> bool:
    """True if the recipe trains its own task head instead of taking the model's."""
    return any(isinstance(stage, Finetune) and stage.train.epochs > 0 for stage in recipe.stages)


def _source_problems(recipe: Recipe, config: Mapping[str, Any]) -> list[Problem]:
    """The problem of a model without a task head for the task, in a recipe that trains none."""
    named = config.get("architectures")
    if not named or has_task_head(config, recipe.task) or _trains_head(recipe):
        return []
    message = f"the model is a {named[0]}, which has no task head for {recipe.task.type}"
    there = isinstance(recipe.stages[0], Finetune)
    fix = "train it in its `finetune` stage" if there else "put a `finetune` stage first"
    return [Problem(message, f"{fix}, or name a model that was fine-tuned", ("model",))]


def _planned(recipe: Recipe, config: Mapping[str, Any], model: Shape, problems: list[Problem]) -> list[Shape]:
    """The shape of the model, then the shape after each stage; adds what cannot work to `problems`."""
    shapes = [model]
    outputs = recipe.task.outputs
    if outputs is not None and model.labels != outputs and not _trains_head(recipe):
        message = f"the model's head has {model.labels} outputs, a {recipe.task.type} task needs {outputs}"
        problems.append(Problem(message, "put a `finetune` stage first", ("model",)))
    problems += _source_problems(recipe, config)
    problems += _length_problems(recipe.task, model, ("task",))
    known = {"model": model, "source": model}
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        task, specs = stage.task_of(recipe.task), stage.specs()
        known = {**{spec: s for spec in specs.values() if (s := _known_shape(spec))}, **known, "parent": shapes[-1]}
        # A student starts from the model it names, with the task head of the stage's task.
        start = known.get(specs.get(("student", "from"), "parent"), shapes[-1])
        at = Place(recipe, index, start)
        problems += apply_rules(START, at)
        if at.has_own_task:
            problems += _length_problems(task, start, ("stages", index, "task"))
        elif ("student", "from") in specs and start is not known["model"]:
            problems += _length_problems(task, start, ("task",))
        start = replace(start, head=task.head, labels=_label_count(task, start, known["source"]))
        found = stage.problems(start, known, task)
        problems += [_within_stage(index, problem) for problem in found]
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


def _label_count(task: Task, start: Shape, source: Shape) -> int:
    """Outputs of a stage's task head: as many as the source has for the same task, because a student answers alike."""
    return source.labels if source.head == task.head else task.head_labels() or start.labels


def _known_shape(spec: str) -> Shape | None:
    """The shape of a model directory that a stage names; None for a stage, a Hub id, or a directory without config."""
    if not is_local(spec) or not (local_path(spec) / "config.json").is_file():
        return None
    try:
        return shape_of(model_config(spec))
    except HfcompressError:
        return None


def _unknown_names(index: int, recipe: Recipe) -> list[Problem]:
    """The models that a stage names and that do not exist when it runs, with key paths inside the stage."""
    names = recipe.stage_names()
    named = recipe.stages[index].specs().items()
    return [problem for key, spec in named for problem in _spec_problems(spec, key, index, names)]


def _spec_problems(spec: str, key: Key, index: int, names: list[str]) -> list[Problem]:
    known, what = ["source", "parent", "model", *names[:index]], "teacher" if "teacher" in key else "model"
    if spec in known or is_local(spec):
        return []
    if spec in names:
        return [Problem(f"the {what} {spec} is not made yet at this stage", "name an earlier one", key)]
    if re.fullmatch(r"\d\d-\w+", spec):
        return [Problem(f"the recipe has no stage {spec}", did_you_mean(spec, known), key)]
    try:
        refuse_a_path(spec, what)
    except HfcompressError as error:
        return [replace(p, key=key) for p in error.problems]
    return []


def _missing_extras(recipe: Recipe) -> list[Problem]:
    if recipe.measure.energy and importlib.util.find_spec("codecarbon") is None:
        return [Problem("codecarbon is not installed", "pip install 'hfcompress[energy]'", ("measure", "energy"))]
    return []
