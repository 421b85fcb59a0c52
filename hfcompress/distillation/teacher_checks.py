"""Checks that a teacher can teach a student, by configs, tokenizers and encoded rows; runs no model.

`check` applies these checks to the models on this machine (`local_teacher_problems`); a run applies them again, to all
models and all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.data.labels import require_same_labels
from hfcompress.data.tokenizer_state import hash_inputs, input_state, split_alike, splitting_state, vocabulary_state
from hfcompress.models.shape import Shape
from hfcompress.training.task_heads import has_task_head
from hfcompress.utils.errors import HfcompressError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfcompress.data.local_models import LocalModel, LocalModels
    from hfcompress.data.task import Task
    from hfcompress.distillation.options import DistillationOptions


def label_problems(name: str, theirs: Mapping[str, int], labels: Mapping[str, int], task: Task) -> list[Problem]:
    """Reports labels with different ids in teacher and student.

    Args:
        name: The teacher's name.
        theirs: Its label names and ids.
        labels: The student's label names and ids.
        task: The task.
    """
    if task.head not in ("sequence", "token") or len(labels) < 2:
        return []
    try:
        require_same_labels(f"the teacher {name}", theirs, labels)
    except HfcompressError as error:
        return error.problems
    return []


def length_problems(name: str, teacher: Shape, task: Task) -> list[Problem]:
    """Reports a `max_length` that is too long for the teacher."""
    limit = teacher.usable_positions
    if task.max_length <= limit:
        return []
    message = f"the teacher {name} reads at most {limit} tokens, and max_length is {task.max_length}"
    return [Problem(message, f"set task.max_length to {limit} or less, or name another teacher")]


def same_inputs(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> bool:
    """True if two tokenizers make the same inputs from these rows, so that student and teacher can share batches.

    Args:
        student, teacher: The tokenizers.
        rows: Rows of each split, encoded with the student's tokenizer; a stream is not read.
        theirs: The same rows, encoded with the teacher's.
    """
    if rows is theirs:
        return True
    if vocabulary_state(student) != vocabulary_state(teacher):
        return False
    known = [split for split in rows if hasattr(rows[split], "__len__")]
    if len(known) < len(rows) and splitting_state(student) != splitting_state(teacher):
        return False
    return all(hash_inputs(rows[split]) == hash_inputs(theirs[split]) for split in known)


def same_behaviour(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """True if two tokenizers make the same inputs from every text, so that no rows need to be compared."""
    return input_state(student) == input_state(teacher)


def reading_problems(
    name: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: Any,
    theirs: Any,
    options: DistillationOptions,
    head: str,
    first: bool,
) -> list[Problem]:
    """Reports the reasons why a teacher with other inputs than the student cannot teach it.

    Args:
        name: The teacher's name.
        student, teacher: The tokenizers.
        rows, theirs: The same train rows, encoded with each of them.
        options: The losses.
        head: The kind of task head.
        first: True for the first teacher, the only one whose layers are compared.
    """
    if head == "mask":
        message = (
            f"the teacher {name} has another vocabulary than the student, or splits texts differently, and a task on "
            "raw text compares their answers for each token"
        )
        return [Problem(message, "use a teacher with the same tokenizer, and `vocabulary: keep`")]
    layers = first and bool(options.needs)
    if (not layers and head == "sequence") or split_alike(student, teacher, rows, theirs):
        return []
    if layers:
        message = f"the teacher {name} has another tokenizer than the student, so their layers see other tokens"
        fix = "use only losses on logits (soft_labels, hard_labels), or a teacher with the same tokenizer"
    else:
        message = f"the teacher {name} has another tokenizer than the student, so its answers are for other tokens"
        fix = "use a teacher with the same tokenizer"
    return [Problem(message, fix)]


def head_problems(name: str, config: Mapping[str, Any], task: Task) -> list[Problem]:
    """Reports a teacher whose task head is for another task."""
    if has_task_head(config, task):
        return [replace(p, message=f"the teacher {name}: {p.message}", key=()) for p in task.head_problems(config)]
    if not config.get("architectures"):
        return []
    message = f"the teacher {name} is a {config['architectures'][0]}, which has no task head for {task.type}"
    return [Problem(message, "put a `finetune` stage first, or name a model that was fine-tuned for this task")]


def local_teacher_problems(options: DistillationOptions, student: LocalModel, models: LocalModels) -> list[Problem]:
    """Reports the reasons why teachers on this machine cannot teach a student that starts from a model on it.

    Returns:
        The problems; their keys are paths inside the block with the losses and the teacher.
    """
    found = list[Problem]()
    if models.readable:
        for number, loss in enumerate(options.losses):
            found += [
                replace(p, key=("losses", number, *p.key)) for p in loss.task_problems(models.task, models.labels)
            ]
    for index, (key, name) in enumerate(options.teacher_specs().items()):
        teacher = models.named.get(name)
        if teacher is None:
            continue
        problems = list[Problem]()
        needs_head = models.task.head != "mask" or any(loss.needs_logits for loss in options.losses)
        if teacher.config is not None and needs_head:
            problems += head_problems(name, teacher.config, models.task)
        if models.readable and teacher.labels is not None and models.task.head in ("sequence", "token"):
            problems += label_problems(name, teacher.labels, models.labels, models.task)
        if models.readable and not problems and teacher.directory != student.directory:
            problems += _local_reading_problems(name, teacher, student, models, options, first=index == 0)
        found += [replace(problem, key=key) for problem in problems]
    return found


def _local_reading_problems(
    name: str, teacher: LocalModel, student: LocalModel, models: LocalModels, options: DistillationOptions, first: bool
) -> list[Problem]:
    try:
        tokenizers = models.tokenizer(student), models.tokenizer(teacher)
        if same_behaviour(*tokenizers):
            return []
        rows, theirs = models.rows(student), models.rows(teacher)
    except HfcompressError as error:
        return error.problems
    if same_inputs(*tokenizers, rows, theirs):
        return []
    return reading_problems(name, *tokenizers, rows["train"], theirs["train"], options, models.task.head, first)
