"""Class weights of the loss, for data in which some classes are rare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from hfcompress.data.task import IGNORED, Task
from hfcompress.utils.errors import HfcompressError, Problem, did_you_mean

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

WITH_CLASSES = ("text-classification", "token-classification")
"""The types of tasks whose labels are classes."""


def _parse(value: Any) -> Any:
    """Reads `balanced`, or class names and their weights; YAML gives a name such as 0 as a number."""
    if value is None or value == "balanced":
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"class weights are `balanced` or a mapping from class names to weights, not {value!r}")
    found = {}
    for name, weight in value.items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"YAML does not read the class name {name!r} as text; put it in quotes")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of class '{name}' is a number above 0, not {weight!r}")
        found[str(name)] = float(weight)
    return found


_Spelled = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, float] | None, BeforeValidator(_parse, json_schema_input_type=_Spelled)
]
"""`balanced`, or the weights of some classes; all others have weight 1."""


def class_weight_problems(
    class_weights: ClassWeights, task: Task, names: Mapping[str, Any] | None = None
) -> list[Problem]:
    """Returns the problems of class weights.

    Args:
        class_weights: The weights of the recipe.
        task: The task.
        names: The names of the classes; None if they are not known yet.
    """
    if class_weights is None:
        return []
    if task.type not in WITH_CLASSES:
        return [Problem(f"a {task.type} task has no classes to weigh", "leave `class_weights` out", ("class_weights",))]
    if names is None or isinstance(class_weights, str):
        return []
    return [
        Problem(f"there is no class '{name}' to weigh", did_you_mean(name, names), ("class_weights", name))
        for name in class_weights
        if name not in names
    ]


def weigh_classes(class_weights: ClassWeights, rows: datasets.Dataset, labels: Mapping[str, int]) -> Tensor | None:
    """Computes the weight of each class in the loss.

    With `balanced`, a class that has `count` of the `n` labels weighs `n / (classes · count)`, as in scikit-learn's
    `compute_class_weight`: every class then adds the same to the loss. A class without labels has weight 1 and is not
    counted.

    Args:
        class_weights: The weights of the recipe.
        rows: Encoded train rows.
        labels: The task head's label names and ids.

    Returns:
        `(classes,)`, in the order of the ids; None if the recipe has no class weights.

    Raises:
        HfcompressError: if the recipe names a class that the task head does not have.
    """
    import numpy as np
    import torch

    if class_weights is None:
        return None
    if isinstance(class_weights, str):
        given = np.concatenate([np.atleast_1d(row) for row in rows["labels"][:]])
        counts = np.bincount(given[given != IGNORED], minlength=len(labels))
        there = counts > 0
        return torch.from_numpy(np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 1.0)).float()
    unknown = [name for name in class_weights if name not in labels]
    if unknown:
        raise HfcompressError(f"there is no class '{unknown[0]}' to weigh", did_you_mean(unknown[0], labels))
    weights = torch.ones(len(labels))
    for name, weight in class_weights.items():
        weights[labels[name]] = weight
    return weights
