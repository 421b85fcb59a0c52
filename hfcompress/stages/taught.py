"""What every stage that learns from a teacher can say: losses, teachers, layer map, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from hfcompress.base.component import Strict
from hfcompress.base.errors import Key, Problem
from hfcompress.base.shape import Shape
from hfcompress.losses.base import AnyLoss, Loss
from hfcompress.stages.layer_map import LayerMap, layer_map_problems
from hfcompress.stages.teachers import AnyTeachers, Teachers
from hfcompress.stages.train import Train

Losses = Annotated[list[AnyLoss], Field(min_length=1)]


class Taught(Strict):
    """Learning from a teacher."""

    losses: Losses
    """What is learnt from: names, or mappings `{use: NAME, weight: …}` with options."""
    teacher: AnyTeachers = Teachers(models=["source"])
    """Who teaches: a name, a list of names (an ensemble), or `{models, combine, weights}`."""
    layer_map: LayerMap = "uniform"
    """Which teacher layer each student layer learns from: `uniform`, `last`, `top`, `bottom`, `dynamic` (the nearest
    ones in order, found anew in each step; hidden states only), or pairs `[student, teacher]` from 1."""
    teacher_cache: Literal["auto", "off", "logits", "cls", "hidden_states"] = "auto"
    """Ask the teacher once for each row and keep the answers on disk. `auto` keeps logits where nothing else is looked
    at and there is more than one epoch; `cls` and `hidden_states` keep those too."""

    @property
    def asks(self) -> bool:
        """Whether any loss needs a teacher."""
        return any(loss.needs_teacher for loss in self.losses)

    def teacher_specs(self) -> dict[Key, str]:
        """The teachers' names, by the keys that spell them."""
        names = self.teacher.models
        if not self.asks:
            return {}
        return (
            {("teacher",): names[0]} if len(names) == 1 else {("teacher", "models", i): x for i, x in enumerate(names)}
        )

    @property
    def needs(self) -> frozenset[str]:
        """What the losses look at besides logits."""
        return frozenset[str]().union(*(loss.needs for loss in self.losses))

    def kept(self, train: Train, head: str, rows: int | None, processes: int = 1) -> str | None:
        """What of the teacher's answers is kept on disk; None where it is asked live."""
        if self.teacher_cache == "auto":
            again = rows is not None and train.rows_seen(rows, processes) > rows
            return "logits" if again and not self.needs and head != "mask" else None
        return None if self.teacher_cache == "off" else self.teacher_cache

    def taught_problems(self, student: Shape, known: Mapping[str, Shape], task: Any) -> list[Problem]:
        """What cannot work, of the teachers whose shapes are known."""
        found = cache_problems(self, task.head)
        if not self.asks:
            return found
        for index, name in enumerate(self.teacher.models):
            teacher = known.get(name)
            if teacher is not None:
                found += self.meeting_problems(student, teacher, first=index == 0)
        return found

    def meeting_problems(self, student: Shape, teacher: Shape, first: bool = True) -> list[Problem]:
        """Why this teacher cannot teach this student; all but the first are asked for their logits alone."""
        teacher = replace(teacher, labels=teacher.labels if teacher.head == student.head else student.labels)
        if not first:
            return logit_problems(student, teacher)
        found = list[Problem]()
        if any(loss.needs and loss.mapped for loss in self.losses):
            found += layer_map_problems(self.layer_map, len(student.layers), len(teacher.layers))
        for index, loss in enumerate(self.losses):
            found += [Problem(why, "", ("losses", index)) for why in loss.problems(student, teacher)]
        if self.layer_map == "dynamic":
            found += [_not_dynamic(i, x) for i, x in enumerate(self.losses) if x.mapped and x.needs - {"hidden_states"}]
        return found


def logit_problems(student: Shape, teacher: Shape) -> list[Problem]:
    """Why the logits of these two cannot be compared."""
    if student.labels == teacher.labels:
        return []
    message = f"the student has {student.labels} labels and the teacher {teacher.labels}"
    return [Problem(message, "name a teacher that was fine-tuned for this task", ("teacher",))]


def _not_dynamic(index: int, loss: Loss) -> Problem:
    message = f"`layer_map: dynamic` aligns hidden states, {loss.name} needs a fixed map"
    return Problem(message, "leave it out, or name another map", ("losses", index))


def cache_problems(taught: Taught, head: str) -> list[Problem]:
    """Why the answers cannot be kept as the recipe says."""
    kept, key = taught.teacher_cache, ("teacher_cache",)
    if kept in ("auto", "off"):
        return []
    if head == "mask":
        return [Problem("the answers of a fill-mask teacher are as wide as its vocabulary", "say `off`", key)]
    inside = sorted(taught.needs - {"hidden_states"})
    if inside:
        return [Problem(f"a loss looks at {', '.join(inside)}, which are never kept", "say `off`", key)]
    if "hidden_states" in taught.needs and kept == "logits":
        return [Problem("a loss looks at hidden states, and logits alone are kept", "say `hidden_states`", key)]
    whole = [loss.name for loss in taught.losses if "hidden_states" in loss.needs and not loss.first_token_only]
    if kept == "cls" and whole:
        return [Problem(f"{whole[0]} looks at every token, and the first alone is kept", "say `hidden_states`", key)]
    return []
