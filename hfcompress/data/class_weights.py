"""How much each class counts in the loss, for data in which some are rare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from hfcompress.data.task import IGNORED, Task
from hfcompress.utils.errors import HfcompressError, Problem, did_you_mean

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

WITH_CLASSES = ("text-classification", "token-classification")
"""The tasks whose labels are classes."""


def _parse(value: Any) -> Any:
    """`balanced`, or class names and their weights; YAML reads a name such as 0 as a number."""
    if value is None or value == "balanced":
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"class weights are `balanced`, or a mapping of class names to weights, not {value!r}")
    found = {}
    for name, weight in value.items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f"YAML reads the class name {name!r} as something else than text; put it in quotes")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"the weight of class '{name}' is a number above 0, not {weight!r}")
        found[str(name)] = float(weight)
    return found


ClassWeights = Annotated[Literal["balanced"] | dict[str, float] | None, BeforeValidator(_parse)]
"""`balanced`, or a weight for some classes; those that are not named have 1."""


def class_weight_problems(asked: ClassWeights, task: Task, names: Mapping[str, Any] | None = None) -> list[Problem]:
    """Why classes cannot be weighed so.

    Args:
        asked: What the recipe says.
        task: The task.
        names: The names of the classes; None where they are not known.
    """
    if asked is None:
        return []
    if task.type not in WITH_CLASSES:
        return [Problem(f"a {task.type} task has no classes to weigh", "leave `class_weights` out", ("class_weights",))]
    if names is None or isinstance(asked, str):
        return []
    return [
        Problem(f"there is no class '{name}' to weigh", did_you_mean(name, names), ("class_weights", name))
        for name in asked
        if name not in names
    ]


def weigh_classes(asked: ClassWeights, rows: datasets.Dataset, labels: Mapping[str, int]) -> Tensor | None:
    """The weight of each class in the loss; None where nothing is asked for.

    `balanced` is `n / (classes · count)` of a class with `count` of the `n` labels, as scikit-learn's
    `compute_class_weight` defines it: every class then adds the same to the loss. Classes without a label have 1 and
    are not counted.

    Args:
        asked: What the recipe says.
        rows: Encoded train rows.
        labels: The head's label names and ids.

    Returns:
        `(classes,)`, in the order of the ids.

    Raises:
        HfcompressError: for a class that the head does not have.
    """
    import numpy as np
    import torch

    if asked is None:
        return None
    if isinstance(asked, str):
        given = np.concatenate([np.atleast_1d(row) for row in rows["labels"][:]])
        counts = np.bincount(given[given != IGNORED], minlength=len(labels))
        there = counts > 0
        return torch.from_numpy(np.where(there, counts.sum() / (there.sum() * np.maximum(counts, 1)), 1.0)).float()
    unknown = [name for name in asked if name not in labels]
    if unknown:
        raise HfcompressError(f"there is no class '{unknown[0]}' to weigh", did_you_mean(unknown[0], labels))
    weights = torch.ones(len(labels))
    for name, weight in asked.items():
        weights[labels[name]] = weight
    return weights
