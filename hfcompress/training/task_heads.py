"""The task head: the last layers of a model, which give the task's logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.data.labels import match_one_to_one, names_by_id
from hfcompress.data.values import is_integer
from hfcompress.models.architectures import TASK_HEADS, class_name_of
from hfcompress.models.artifact import Artifact, label_ids, load_finite_model, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.data.task import Task


def has_task_head(config: Mapping[str, Any], task: Task) -> bool:
    """True if a config.json names a class with the task's kind of task head."""
    return class_name_of(config).endswith(TASK_HEADS[task.head])


def load_with_task_head(task: Task, artifact: Artifact, fresh: bool, like: Artifact | None = None) -> PreTrainedModel:
    """Loads a model with the task's kind of task head.

    Args:
        task: The task.
        artifact: The model that the weights come from.
        fresh: True to make a new task head if it is missing or has other labels; if false, that is an error.
        like: A model of the same task, whose label names the new task head gets; by default those of the data.
    """
    config = read_config(artifact.path)
    if not fresh:
        return load_finite_model(artifact.path, task.auto_class)
    if task.head in ("span", "mask"):
        return load_finite_model(artifact.path, task.auto_class, fresh_head=True)
    names = label_names(task, config, read_config(like.path) if like else None)
    return load_finite_model(
        artifact.path,
        task.auto_class,
        fresh_head=True,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type=task.problem_type,
    )


def label_names(task: Task, config: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> list[str]:
    """Names the outputs of a new task head, in the order of their ids.

    Args:
        task: The task.
        config: The config of the model that gets the task head.
        like: The config of a model of the same task, whose label names it gets; by default those of the data.
    """
    if like is not None and has_task_head(like, task):
        return names_by_id(label_ids(like))
    names: list[str] = task.label_names()
    own = {str(name): int(index) for index, name in (config.get("id2label") or {}).items()}
    # A model that names these labels keeps its names and their order, also if the data has numbers instead of names.
    counted = names == [str(index) for index in range(len(own))] and not any(map(is_integer, own))
    return names_by_id(own) if counted or match_one_to_one(names, own) else names
