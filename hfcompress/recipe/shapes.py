"""Plans the shapes of a recipe's models, and finds what cannot work with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import is_local, model_config
from hfcompress.models.shape import Shape, shape_of
from hfcompress.recipe.rules import START, Place, apply_rules
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError, Key, Problem
from hfcompress.utils.places import local_path

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.recipe.schema import Recipe


def plan_shapes(recipe: Recipe, config: Mapping[str, Any], problems: list[Problem]) -> list[Shape]:
    """Plans the shape of the recipe's model and the shape after each stage.

    Args:
        recipe: The recipe.
        config: The config.json of its model.
        problems: Everything that cannot work is added here, so that it is kept if a later step raises an error.
    """
    model = shape_of(config, head=recipe.task.head)
    problems += _check_source(recipe, config, model)
    problems += _check_length(recipe.task, model, ("task",))
    shapes, known = [model], {"model": model, "source": model}
    for index, (name, stage) in enumerate(zip(recipe.stage_names(), recipe.stages, strict=True)):
        task, specs = stage.task_of(recipe.task), stage.specs()
        named = {spec: shape for spec in specs.values() if (shape := _find_shape(spec))}
        known = {**named, **known, "parent": shapes[-1]}
        # A student starts from the model it names, with the task head of the stage's task.
        start = known.get(specs.get(("student", "from"), "parent"), shapes[-1])
        at = Place(recipe, index, start)
        problems += apply_rules(START, at)
        if at.has_own_task:
            problems += _check_length(task, start, ("stages", index, "task"))
        elif ("student", "from") in specs and start is not known["model"]:
            problems += _check_length(task, start, ("task",))
        start = replace(start, head=task.head, labels=_count_labels(task, start, known["source"]))
        found = [
            replace(problem, key=("stages", index, *problem.key)) for problem in stage.problems(start, known, task)
        ]
        problems += found
        shapes.append(stage.plan(start) if not found else start)
        if not stage.compresses:
            labels = recipe.task.head_labels() if recipe.trains_source_head else None
            shapes[-1] = known["source"] = replace(shapes[-1], labels=labels or shapes[-1].labels)
        known[name] = shapes[-1]
    return shapes


def _check_source(recipe: Recipe, config: Mapping[str, Any], model: Shape) -> list[Problem]:
    """Finds the problems of a model whose task head does not fit the task, in a recipe that trains no other head."""
    if recipe.trains_source_head:
        return []
    task, outputs, named, problems = recipe.task, recipe.task.outputs, config.get("architectures"), list[Problem]()
    if outputs is not None and model.labels != outputs:
        message = f"the model's task head has {model.labels} outputs, a {task.type} task needs {outputs}"
        problems.append(Problem(message, "put a `finetune` stage first", ("model",)))
    if named and not has_task_head(config, task):
        # A recipe can start with `finetune: {train: {epochs: 0}}`, which trains no head.
        fix = "put a `finetune` stage first" if recipe.stages[0].compresses else "train it in its `finetune` stage"
        message = f"the model is a {named[0]}, which has no task head for {task.type}"
        problems.append(Problem(message, f"{fix}, or name a model that was fine-tuned", ("model",)))
    return problems


def _check_length(task: Task, model: Shape, key: Key) -> list[Problem]:
    limit = model.usable_positions
    if task.max_length <= limit:
        return []
    message = f"max_length is {task.max_length}, more than the model's position table allows ({limit})"
    return [Problem(message, f"set it to {limit} or less", (*key, "max_length"))]


def _count_labels(task: Task, start: Shape, source: Shape) -> int:
    """Counts the outputs of a stage's task head: as many as the source has, if it has a head of the same kind."""
    return source.labels if source.head == task.head else task.head_labels() or start.labels


def _find_shape(spec: str) -> Shape | None:
    """Finds the shape of a model directory; None for a stage, a Hub id, or a directory without a usable config."""
    if not is_local(spec) or not (local_path(spec) / "config.json").is_file():
        return None
    try:
        return shape_of(model_config(spec))
    except HfcompressError:
        return None
