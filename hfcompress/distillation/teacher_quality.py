"""Refuses a teacher that is not better than chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.distillation.teachers import Member

RARE = 0.8
"""The share of the largest class from which a data set counts as imbalanced."""


def require_better_than_chance(member: Member, dev: Any, task: Task, made_by: str | None) -> float | None:
    """Scores a teacher on dev, and compares it by a paired bootstrap with the best answers that ignore the texts.

    All processes of a distributed run share the rows.

    Args:
        member: The teacher.
        dev: Dev rows, encoded with the teacher's tokenizer.
        task: The task.
        made_by: The stage of this recipe that made it; None if it came from elsewhere.

    Returns:
        The score; None if the task has no answers to compare (raw text without masks).

    Raises:
        HfcompressError: if the difference of the scores is not above 0 with 95% certainty.
    """
    from hfcompress.training.evaluate import judge

    assert member.model is not None
    if not task.has_labels:
        return None
    predictions, references, features = judge(member.model, dev, member.tokenizer, task, shared=True)
    score = compare_with_chance(f"the teacher {member.stage}", predictions, references, features, task, made_by)
    log.info(f"teacher: {member.stage}, {task.metric_name} {score:.4f} on dev")
    return score


def compare_with_chance(
    name: str, predictions: Any, references: Any, features: Any, task: Task, made_by: str | None = None
) -> float:
    """Requires that answers to the dev split score better than the best ones that ignore the texts; returns the score.

    Args:
        name: The model that gave the answers, in words.
        predictions, references: Its answers and the right ones, see `Task.judge`.
        features: The encoded rows.
        task: The task.
        made_by: The stage of this recipe that made the model; None if it came from elsewhere.

    Raises:
        HfcompressError: if the difference of the scores is not above 0 with 95% certainty.
    """
    blind = task.answer_blindly(references, features)
    score, chance = (float(task.score(answers, references)) for answers in (predictions, blind))
    if task.gain(predictions, blind, references) <= 0:
        raise HfcompressError(
            f"{name} is at chance: its {task.metric_name} on the dev split is {score:.4f}, that of "
            f"the best answers without the texts is {chance:.4f}, and over "
            f"{len(references):,} units the difference is not above 0 with 95% certainty",
            "\n    ".join(_list_fixes(task, blind, references, made_by)),
        )
    return score


def _list_fixes(task: Task, blind: Any, references: Any, made_by: str | None) -> list[str]:
    """Lists what helps a teacher that is at chance."""
    if made_by is not None:
        found = [
            f"the stage {made_by} did not teach it: train longer, with another learning rate, or another base model"
        ]
    else:
        found = ["put a `finetune` stage first, or name a model that was fine-tuned for this task"]
    if task.type != "text-classification" or (share := float((references == blind).mean())) < RARE:
        return found
    if task.metric == "accuracy":
        found.append(f"{share:.1%} of the rows are of one class: `metric: matthews_correlation` or `f1` tells more")
    found.append("`class_weights: balanced` in the `finetune` stage makes rare classes count")
    return found
