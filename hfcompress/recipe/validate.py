"""Finds everything that cannot work in a recipe, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfcompress.data.source import is_local, model_config, require_weights
from hfcompress.measure.energy import require_energy
from hfcompress.measure.rows import find_length_problems
from hfcompress.measure.seeds import LARGEST
from hfcompress.models.artifact import label_ids
from hfcompress.models.shape import Shape
from hfcompress.recipe.local_checks import find_local_problems, find_padding_problems
from hfcompress.recipe.names import find_unknown_names
from hfcompress.recipe.rules import ORDER, Place, apply_rules
from hfcompress.recipe.shapes import plan_shapes
from hfcompress.utils.errors import HfcompressError, Problem

if TYPE_CHECKING:
    from hfcompress.recipe.loader import Loaded
    from hfcompress.recipe.schema import Recipe

_READING = (("task", "dataset"), ("task", "text"), ("task", "label"))
"""The keys whose problems keep rows from being read."""


def check(loaded: Loaded, weights: bool = True, download: bool = False) -> list[Shape]:
    """Finds everything that cannot work, before anything is trained.

    Args:
        loaded: The recipe.
        weights: Also require the weights of the model and the packages that the stages run on, and read the labels of
            local data. `plan` needs none of this.
        download: Also read the labels of a data set on the Hub.

    Returns:
        The shape of the model, then the shape after each stage.

    Raises:
        HfcompressError: with all problems at once.
    """
    recipe, shapes = loaded.recipe, list[Shape]()
    problems = [*recipe.task.problems(), *_check_stages(recipe, weights), *_find_energy_problems(recipe)]
    problems += _find_wrong_seeds(recipe)
    problems += find_length_problems(recipe.measure.latency.lengths, recipe.task.max_length)
    try:
        config = model_config(recipe.model)
        problems += [] if recipe.trains_source_head else recipe.task.head_problems(config)
        shapes = plan_shapes(recipe, config, problems)
        readable = not any(problem.key[:2] in _READING for problem in problems)
        if readable and (download or (weights and is_local(recipe.task.dataset))):
            problems += recipe.task.label_problems(None if recipe.trains_source_head else label_ids(config))
            problems += _find_missing_slices(recipe)
        if weights:
            require_weights(recipe.model)
            problems += find_padding_problems(recipe, download)
        if weights and not problems:
            problems += find_local_problems(recipe, readable, download)
    except HfcompressError as error:
        problems += [replace(p, key=p.key or ("model",)) for p in error.problems]
    if problems:
        raise HfcompressError(replace(p, where=p.where or loaded.document.where(p.key)) for p in problems)
    return shapes


def _check_stages(recipe: Recipe, weights: bool) -> list[Problem]:
    """Checks the order of the stages, the models that they name, and the packages that they need."""
    problems = list[Problem]()
    for index, stage in enumerate(recipe.stages):
        problems += apply_rules(ORDER, Place(recipe, index))
        found = find_unknown_names(recipe, index) + (stage.unavailable() if weights else [])
        problems += [replace(p, key=("stages", index, *p.key)) for p in found]
    return problems


def _find_missing_slices(recipe: Recipe) -> list[Problem]:
    """Finds columns of `measure.slices` that cannot be read: the report would miss them after all training."""
    try:
        recipe.task.read_slices(recipe.measure.slices)
    except HfcompressError as error:
        return [replace(p, key=("measure", "slices")) for p in error.problems]
    return []


def _find_wrong_seeds(recipe: Recipe) -> list[Problem]:
    """Finds seeds that lack the recipe's own, whose models are timed and published, or that are too large."""
    seeds, key = recipe.measure.seeds, ("measure", "seeds")
    if isinstance(seeds, list) and recipe.seed not in seeds:
        fix = f"set `seed: {seeds[0]}`, or name {recipe.seed} too"
        return [Problem(f"{seeds} lacks the recipe's seed, {recipe.seed}", fix, key)]
    if max(recipe.list_seeds()) > LARGEST:
        return [Problem(f"the last seed would be larger than {LARGEST}", "choose a smaller `seed:`", key)]
    return []


def _find_energy_problems(recipe: Recipe) -> list[Problem]:
    """Finds out if codecarbon is missing, or has no data for the country."""
    try:
        require_energy(recipe.measure.energy)
    except HfcompressError as error:
        return error.problems
    return []
