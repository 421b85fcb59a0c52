"""Rules for the stages of a recipe: their order, and the task heads that they start from.

In a message `{stage}`, `{task}` and `{architecture}` stand for those of the stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.models.shape import Shape
from hfcompress.utils.errors import Problem, Rule

if TYPE_CHECKING:
    from hfcompress.context import Stage
    from hfcompress.data.task import Task
    from hfcompress.recipe.schema import Recipe


@dataclass(frozen=True)
class Place:
    """A stage at its place in a recipe.

    Attributes:
        recipe: The recipe.
        index: The number of the stage, from 0.
        start: The shape of the model that the stage starts from; None while shapes are not known.
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
        message="finetune makes the source, so it must come first",
        fix="move it to the top",
    ),
    Rule(
        when=lambda at: at.is_last and at.has_own_task,
        message="the recipe ends with a model for another task",
        fix="add a `distill` stage on the recipe's task after it",
        key=("task",),
    ),
    Rule(
        when=lambda at: any(stage.ends_recipe for stage in at.earlier),
        message="{stage} cannot follow quantize",
        fix="put quantize last",
    ),
)
"""Rules for the order of the stages, whatever the model is."""
START: tuple[Rule[Place], ...] = (
    Rule(
        when=lambda at: at.start is not None and at.start.head != at.task.head and not at.stage.makes_task_head,
        message="the model that {stage} gets here has no task head for {task}",
        fix="put a `distill` stage on the recipe's task before it",
    ),
    Rule(
        when=lambda at: at.start is not None and at.has_own_task and at.task.head not in at.start.spec.task_head_kinds,
        message="no {architecture} model has a task head for {task}",
        fix="give the stage another type of task",
        key=("task",),
    ),
)
"""Rules for the task head of the model that a stage starts from."""


def apply_rules(rules: tuple[Rule[Place], ...], at: Place) -> list[Problem]:
    """Applies rules to a stage.

    Returns:
        A problem for each rule that refuses the stage, with its key path inside the recipe.
    """
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
