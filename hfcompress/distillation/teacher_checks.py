"""Why a teacher cannot teach a student, as far as configs, tokenizers and encoded rows tell.

`check` asks before anything runs, of what lies on this machine; a run asks again, of all models and all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.data.labels import require_same_labels
from hfcompress.data.reading import behaviour_of, inputs_hash, split_alike, splitting_of, words_of
from hfcompress.models.shape import Shape
from hfcompress.training.task_heads import has_head
from hfcompress.utils.errors import HfcompressError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.distillation.options import DistillationOptions


def label_problems(name: str, theirs: Mapping[str, int], labels: Mapping[str, int], task: Task) -> list[Problem]:
    """That teacher and student do not mean the same by a label's id.

    Args:
        name: The teacher's.
        theirs: Its label names and ids.
        labels: The student's.
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
    """That the task's rows are longer than the teacher can read."""
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
    """Whether two tokenizers make the same inputs of the same rows, so that student and teacher share batches.

    Args:
        student, teacher: Their tokenizers.
        rows: Encoded rows of each split, made with the student's; a stream is not read.
        theirs: The same rows, made with the teacher's.
    """
    if rows is theirs:
        return True
    if words_of(student) != words_of(teacher):
        return False
    known = [split for split in rows if hasattr(rows[split], "__len__")]
    if len(known) < len(rows) and splitting_of(student) != splitting_of(teacher):
        return False
    return all(inputs_hash(rows[split]) == inputs_hash(theirs[split]) for split in known)


def same_behaviour(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers make the same inputs of every text, so that no rows need be compared."""
    return behaviour_of(student) == behaviour_of(teacher)


def reading_problems(
    name: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    rows: Any,
    theirs: Any,
    taught: DistillationOptions,
    head: str,
    first: bool,
) -> list[Problem]:
    """Why a teacher that is given other inputs than the student cannot teach it.

    Args:
        name: The teacher's.
        student, teacher: Their tokenizers.
        rows, theirs: The same train rows, encoded with each.
        taught: The losses.
        head: The task's.
        first: Whether layers of this teacher are looked at.
    """
    if head == "mask":
        message = (
            f"the teacher {name} has another vocabulary than the student, or splits texts otherwise, and a task on "
            "raw text compares what they say of each token"
        )
        return [Problem(message, "use a teacher with the same tokenizer, and `vocabulary: keep`")]
    layers = first and bool(taught.needs)
    if (not layers and head == "sequence") or split_alike(student, teacher, rows, theirs):
        return []
    if layers:
        message = f"the teacher {name} has another tokenizer than the student, so their layers see other tokens"
        fix = "use losses on logits alone (soft_labels, hard_labels), or a teacher with the same tokenizer"
    else:
        message = f"the teacher {name} has another tokenizer than the student, so its answers are for other tokens"
        fix = "use a teacher with the same tokenizer"
    return [Problem(message, fix)]


def head_problems(name: str, config: Mapping[str, Any], task: Task) -> list[Problem]:
    """That a teacher's head, as its config tells, is one for another task."""
    if has_head(config, task):
        return [replace(p, message=f"the teacher {name}: {p.message}", key=()) for p in task.head_problems(config)]
    if not config.get("architectures"):
        return []
    message = f"the teacher {name} is a {config['architectures'][0]}, it has no head for {task.type}"
    return [Problem(message, "put a `finetune` stage first, or name a model that was fine-tuned for this task")]
