"""Finds the models that stages name but that do not exist when the stage runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfcompress.data.source import is_local, refuse_a_path
from hfcompress.utils.errors import HfcompressError, Key, Problem, did_you_mean

if TYPE_CHECKING:
    from hfcompress.recipe.schema import Recipe


def find_unknown_names(recipe: Recipe, index: int) -> list[Problem]:
    """Finds the names in a stage that stand for no model, with key paths inside the stage.

    Args:
        recipe: The recipe.
        index: The number of the stage, from 0.
    """
    names = recipe.stage_names()
    specs = recipe.stages[index].specs().items()
    return [problem for key, spec in specs for problem in _check_name(spec, key, names[:index], names[index:])]


def _check_name(spec: str, key: Key, earlier: Sequence[str], later: Sequence[str]) -> list[Problem]:
    known, what = ["source", "parent", "model", *earlier], "teacher" if "teacher" in key else "model"
    if spec in known or is_local(spec):
        return []
    if spec in later:
        return [Problem(f"the {what} {spec} is not made yet at this stage", "name an earlier one", key)]
    if re.fullmatch(r"\d\d-\w+", spec):
        return [Problem(f"the recipe has no stage {spec}", did_you_mean(spec, known), key)]
    try:
        refuse_a_path(spec, what)
    except HfcompressError as error:
        return [replace(p, key=key) for p in error.problems]
    return []
