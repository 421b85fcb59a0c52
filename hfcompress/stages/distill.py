"""A student learns from a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from hfcompress.base.component import Strict
from hfcompress.base.console import say
from hfcompress.base.errors import HfcompressError, Problem
from hfcompress.base.shape import Shape
from hfcompress.losses.base import AnyLoss, Loss
from hfcompress.model.artifact import Artifact, load_model, load_tokenizer
from hfcompress.stages.base import Bench, Stage, require_trainable
from hfcompress.stages.train import Train

Losses = Annotated[list[AnyLoss], Field(min_length=1)]


class Student(Strict):
    """The student's shape; what is not said stays as it is in the model it comes from."""

    layers: int | None = Field(default=None, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    ffn: int | None = Field(default=None, ge=1)
    positions: int | None = Field(default=None, ge=4)
    """Rows of the position table; shorter inputs need fewer."""
    init: Literal["copy", "random"] = "copy"
    """`copy` takes every tensor from the model it comes from, truncated where the student is narrower."""


class Distill(Stage):
    """Trains a student on what a teacher shows it.

    Without `student` the model of the stage before goes on learning, which is how TinyBERT's prediction phase follows
    its intermediate phase.
    """

    kind: Literal["distill"]
    student: Student | None = None
    teacher: str = "source"
    """`source`, `parent`, the name of an earlier stage such as `01-distill`, a directory or a Hub id."""
    losses: Losses
    train: Train = Train()

    def plan(self, shape: Shape) -> Shape:
        wanted = self.student
        if wanted is None:
            return shape
        first = shape.layers[0]
        hidden = wanted.hidden or shape.hidden
        heads = wanted.heads or shape.hidden // shape.head_dim
        even = replace(shape, hidden=hidden, head_dim=hidden // heads, positions=wanted.positions or shape.positions)
        return even.with_layers(wanted.layers or len(shape.layers), heads, wanted.ffn or first.ffn)

    def problems(self, shape: Shape, source: Shape, task: Any) -> list[Problem]:
        found = [*student_problems(self.student, shape, task)]
        if not found and self.teacher == "source":
            found += teaching_problems(self.plan(shape), source, self.losses)
        return found

    def steps(self, rows: int | None) -> int | None:
        return self.train.steps(rows)

    def teacher_spec(self) -> str | None:
        return self.teacher if any(loss.needs_teacher for loss in self.losses) else None

    def run(self, parent: Artifact, bench: Bench) -> None:
        shape = require_trainable(parent, self.kind)
        from hfcompress.model.student import build_student

        tokenizer = load_tokenizer(parent.path)
        student = load_model(parent.path, bench.task.auto_class)
        if self.student is not None:
            target = self.plan(shape)
            layers = [layer - 1 for layer in uniform_map(len(target.layers), len(shape.layers))]
            student, report = build_student(student, target, layers, self.student.init == "random")
            bench.notes["student"] = report
            say("student: " + "; ".join(f"{part} {how}" for part, how in report.items()))
        teach(student, self.losses, self.train, bench.teacher(self.teacher, parent), bench, tokenizer)
        bench.finish(student, tokenizer)


def student_problems(student: Student | None, shape: Shape, task: Any) -> list[Problem]:
    """Why a student of this shape cannot be built for the task."""
    if student is None:
        return []
    found = []
    hidden, heads = student.hidden or shape.hidden, student.heads or shape.hidden // shape.head_dim
    if hidden % heads:
        key = "heads" if student.heads else "hidden"
        found.append(
            Problem(
                f"{heads} heads do not divide the hidden width {hidden}",
                f"use {_nearest_divisor(hidden, heads)} heads, or another width",
                ("student", key),
            )
        )
    positions = (student.positions or shape.positions) - shape.keys.position_offset
    if student.positions and task.max_length > positions:
        found.append(
            Problem(
                f"max_length is {task.max_length}, wider than the student's position table allows ({positions})",
                "lower task.max_length or raise student.positions",
                ("student", "positions"),
            )
        )
    if (student.positions or 0) > shape.positions and student.init == "copy":
        found.append(
            Problem(
                f"the model it comes from has {shape.positions} positions, the student cannot copy {student.positions}",
                "lower it, or say `init: random`",
                ("student", "positions"),
            )
        )
    return found


def _nearest_divisor(width: int, heads: int) -> int:
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - heads), n))


def teaching_problems(student: Shape, teacher: Shape, losses: list[Loss]) -> list[Problem]:
    """Why this teacher cannot teach this student with these losses."""
    found = []
    if any(loss.needs for loss in losses) and len(student.layers) > len(teacher.layers):
        message = f"the student has {len(student.layers)} layers and the teacher {len(teacher.layers)}"
        found.append(Problem(message, "a loss on layers needs a student that is no deeper", ("losses",)))
    if any(loss.needs_teacher for loss in losses) and student.vocab != teacher.vocab:
        message = f"the student's vocabulary has {student.vocab:,} entries and the teacher's {teacher.vocab:,}"
        found.append(Problem(message, "a teacher with the same tokenizer is needed", ("losses",)))
    for index, loss in enumerate(losses):
        found += [Problem(why, "", ("losses", index)) for why in loss.problems(student, teacher)]
    return found


def uniform_map(student_layers: int, teacher_layers: int) -> list[int]:
    """`g(m) = m N / M`, rounded where M does not divide N: the teacher layer (from 1) of each student layer.

    Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, section 4.1. A student that is deeper repeats layers.
    """
    m, n = student_layers, teacher_layers
    return [max((2 * i * n + m) // (2 * m), 1) for i in range(1, m + 1)]


def teach(student: Any, losses: list[Loss], train: Train, teacher: Artifact, bench: Bench, tokenizer: Any) -> None:
    """Trains the student in place with the teacher, which is scored first; notes both dev scores.

    Raises:
        HfcompressError: for a teacher that was never fine-tuned, or that cannot teach this student.
    """
    from hfcompress.base.shape import shape_of
    from hfcompress.stages import training

    rows = {
        split: bench.encoded(split, tokenizer, dict(student.config.label2id))  # type: ignore[arg-type]
        for split in ("train", "dev")
    }
    model, layer_map = None, list[int]()
    if any(loss.needs_teacher for loss in losses):
        shape = require_trainable(teacher, "a teacher")
        own = shape_of(student.config.to_dict())
        problems = teaching_problems(own, shape, losses)
        if problems:
            raise HfcompressError([Problem(p.message, p.fix) for p in problems])
        model = load_model(teacher.path, bench.task.auto_class)
        layer_map = uniform_map(len(own.layers), len(shape.layers))
        bench.notes["teacher"] = {"stage": teacher.stage, "dev": _examined(model, rows["dev"], tokenizer, bench.task)}
        say(f"teacher: {teacher.stage}, {bench.task.metric} {bench.notes['teacher']['dev']:.4f} on dev")
    bench.notes["dev"] = training.train(
        student,
        losses,
        train,
        task=bench.task,
        rows=rows,
        tokenizer=tokenizer,
        checkpoints=bench.checkpoints,
        seed=bench.seed,
        teacher=model,
        layer_map=layer_map,
        callbacks=bench.callbacks,
    )


def _examined(teacher: Any, dev: Any, tokenizer: Any, task: Any) -> float:
    """The teacher's dev score, where it is better than answering without looking."""
    import numpy as np

    from hfcompress.data.metrics import LOWER_IS_BETTER
    from hfcompress.stages import training

    score, blind = training.score(teacher, dev, tokenizer, task), task.baseline(np.asarray(dev["labels"]))
    sign = -1 if task.metric in LOWER_IS_BETTER else 1
    margin = 0.02 if sign > 0 else -0.02 * blind
    if sign * score <= sign * (blind + margin):
        raise HfcompressError(
            f"the teacher scores {task.metric} {score:.4f} on the dev split, no better than always giving the same "
            f"answer ({blind:.4f}): it was never fine-tuned for this task",
            "put a `finetune` stage first, or name a teacher that was",
        )
    return score
