"""The options of a training with a teacher: losses, teachers, layer map, cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hfcompress.distillation.layer_map import LayerMap, layer_map_problems, pairs_of
from hfcompress.distillation.losses.base import AnyLoss
from hfcompress.distillation.teacher_checks import length_problems
from hfcompress.distillation.teachers import AnyTeachers, Teachers
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss
from hfcompress.training.options import Train
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task

Losses = Annotated[list[AnyLoss], Field(min_length=1)]


class DistillationOptions(StrictModel):
    """The losses and the teachers of a training."""

    losses: Losses
    """The losses: names, or mappings `{use: NAME, weight: …}` with options."""
    teacher: AnyTeachers = Teachers(models=["source"])
    """The teacher: a name, a list of names (an ensemble), or `{models, combine, weights}`."""
    layer_map: LayerMap = "uniform"
    """The teacher layer that each student layer learns from: `uniform`, `last`, `top`, `bottom`, `dynamic` (the nearest
    ones in order, chosen again in each step; only for hidden states), or pairs `[student, teacher]` from 1."""
    teacher_cache: Literal["auto", "off", "logits", "cls", "hidden_states"] = "auto"
    """Run the teacher once for each row, and keep its outputs on disk. `auto` keeps logits if no loss needs more and
    there is more than one epoch; `cls` and `hidden_states` keep the hidden states of the first or of all tokens too."""

    @property
    def needs_teacher(self) -> bool:
        """True if any loss needs a teacher."""
        return any(loss.needs_teacher for loss in self.losses)

    def teacher_specs(self) -> dict[Key, str]:
        """Returns the names of the teachers by their keys."""
        names = self.teacher.models
        if not self.needs_teacher:
            return {}
        return (
            {("teacher",): names[0]} if len(names) == 1 else {("teacher", "models", i): x for i, x in enumerate(names)}
        )

    @property
    def needs(self) -> frozenset[str]:
        """The inputs of all losses besides logits."""
        return frozenset[str]().union(*(loss.needs for loss in self.losses))

    def cache_content(self, train: Train, head: str, rows: int | None, processes: int = 1) -> str | None:
        """Decides which outputs of the teacher are kept on disk; None if the teacher runs in each step."""
        if self.teacher_cache == "auto":
            again = rows is not None and train.count_rows_read(rows, processes) > rows
            return "logits" if again and not self.needs and head != "mask" else None
        return None if self.teacher_cache == "off" else self.teacher_cache

    def teacher_problems(self, student: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        """Lists the problems that can be found from the known shapes of the teachers."""
        found = [*cache_problems(self, task.head), *self._idle_problems()]
        for index, loss in enumerate(self.losses):
            found += [replace(p, key=("losses", index, *p.key)) for p in loss.task_problems(task)]
        if not self.needs_teacher:
            return found
        for index, name in enumerate(self.teacher.models):
            teacher = known.get(name)
            if teacher is not None:
                if student.usable_positions >= task.max_length:
                    found += [replace(p, key=("teacher",)) for p in length_problems(name, teacher, task)]
                found += self.compatibility_problems(student, teacher, first=index == 0)
        return found

    def _idle_problems(self) -> list[Problem]:
        """Lists the options that have no effect."""
        found = []
        if not self.needs_teacher and self.says("teacher"):
            message = f"no loss needs a teacher, so `teacher: {', '.join(self.teacher.models)}` changes nothing"
            found.append(Problem(message, "leave it out, or add a loss that needs one (soft_labels)", ("teacher",)))
        if self.layer_map != "uniform" and not self._compares_layers:
            message = "no loss compares layers pair by pair, so `layer_map` changes nothing"
            found.append(Problem(message, "leave it out, or add such a loss (hidden_states)", ("layer_map",)))
        if not self.needs_teacher and self.teacher_cache not in ("auto", "off"):
            message, fix = (
                "no loss needs a teacher, so there are no answers to keep",
                "leave it out, or add soft_labels",
            )
            found.append(Problem(message, fix, ("teacher_cache",)))
        asked = any(loss.needs_teacher and loss.needs_logits for loss in self.losses)
        if len(self.teacher.models) > 1 and not asked:
            message = "no loss uses logits, so only the first teacher is used"
            found.append(Problem(message, "name one teacher, or add soft_labels", ("teacher",)))
        return found

    @property
    def _compares_layers(self) -> bool:
        return any(loss.needs and loss.uses_layer_map for loss in self.losses)

    def compatibility_problems(self, student: Shape, teacher: Shape, first: bool = True) -> list[Problem]:
        """Lists the reasons why a teacher cannot teach a student; only the logits of further teachers are used."""
        if teacher.head != student.head:  # a missing head is reported elsewhere
            teacher = replace(teacher, head=student.head, labels=student.labels)
        if not first:
            asked = [loss for loss in self.losses if loss.needs_logits]
            return [Problem(why, "", ("teacher",)) for loss in asked for why in loss.problems(student, teacher)]
        found = list[Problem]()
        if self._compares_layers:
            found += layer_map_problems(self.layer_map, len(student.layers), len(teacher.layers))
        fits = not found
        for index, loss in enumerate(self.losses):
            why = loss.problems(student, teacher)
            if fits and loss.uses_layer_map:
                pairs = pairs_of(self.layer_map, len(student.layers), len(teacher.layers))
                why = [*why, *loss.map_problems(student, teacher, pairs)]
            found += [Problem(reason, "", ("losses", index)) for reason in why]
        if self.layer_map == "dynamic":
            found += [
                _not_dynamic(i, x)
                for i, x in enumerate(self.losses)
                if x.uses_layer_map and x.needs - {"hidden_states"}
            ]
        return found


def _not_dynamic(index: int, loss: Loss) -> Problem:
    message = f"`layer_map: dynamic` aligns hidden states, but {loss.name} needs a fixed map"
    return Problem(message, "leave it out, or name another map", ("losses", index))


def cache_problems(options: DistillationOptions, head: str) -> list[Problem]:
    """Lists the reasons why the teacher's outputs cannot be kept as the recipe says."""
    kept, key = options.teacher_cache, ("teacher_cache",)
    if kept in ("auto", "off"):
        return []
    if head == "mask":
        return [
            Problem(
                "the answers of a fill-mask teacher are too large to keep: they are as wide as its vocabulary",
                "say `off`",
                key,
            )
        ]
    inside = sorted(options.needs - {"hidden_states"})
    if inside:
        return [Problem(f"a loss uses {', '.join(inside)}, which are never kept", "say `off`", key)]
    if "hidden_states" in options.needs and kept == "logits":
        return [Problem("a loss uses hidden states, but only logits are kept", "say `hidden_states`", key)]
    whole = [loss.name for loss in options.losses if "hidden_states" in loss.needs and not loss.first_token_only]
    if kept == "cls" and whole:
        return [Problem(f"{whole[0]} uses every token, but only the first is kept", "say `hidden_states`", key)]
    return []
