"""Finds the licence of the model that a recipe makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from hfcompress.data.license import License, UnknownLicenseError, read_license
from hfcompress.recipe.schema import Recipe
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.logging import log
from hfcompress.utils.places import last_part

FIX = "say `hub: {license: …}` in the recipe"
"""What to do if the licence is not known."""


def find_license(recipe: Recipe, commits: Mapping[str, str | None] | None = None) -> License:
    """Finds the licence that the card names: the recipe's, else that of the models that the weights come from.

    Args:
        recipe: The recipe.
        commits: The commits of the Hub models that are used, by the name in the recipe.

    Raises:
        UnknownLicenseError: if a model does not tell its licence, or two models have different ones.
    """
    hub = recipe.hub
    if hub.license is not None:
        return License(hub.license, hub.license_name, hub.license_link)
    found: dict[str, License] = {}
    for spec in list_origins(recipe):
        try:
            found[spec] = read_license(spec, (commits or {}).get(spec))
        except UnknownLicenseError as error:
            raise UnknownLicenseError(f"the licence of {_name(spec)} is not known: {error}") from None
    if len(set(found.values())) > 1:
        told = ", ".join(f"{_name(spec)} ({license_.license})" for spec, license_ in found.items())
        raise UnknownLicenseError(f"the weights come from models with different licences: {told}")
    return found[recipe.model]


def list_origins(recipe: Recipe) -> list[str]:
    """Lists the models that the weights come from: the recipe's, and those that students start from."""
    inside = {"source", "parent", "model", *recipe.stage_names()}
    students = [spec for stage in recipe.stages if (spec := stage.specs().get(("student", "from")))]
    return list(dict.fromkeys([recipe.model, *(spec for spec in students if spec not in inside)]))


def _name(spec: str) -> str:
    return last_part(spec) if spec.startswith(("/", "~")) else spec


def ask_for_license(recipe: Recipe, commits: Mapping[str, str | None] | None = None) -> dict[str, str | None] | None:
    """Finds the licence; warns if it is not known.

    Returns:
        The licence, by the Hub's keys; None if it is not known.

    Raises:
        HfcompressError: if it is not known and the recipe wants the model to be pushed.
    """
    try:
        return asdict(find_license(recipe, commits))
    except UnknownLicenseError as error:
        problem = Problem(f"{error}", FIX, ("hub", "license"))
    if recipe.hub.push:
        raise HfcompressError([problem])
    log.warning(f"{problem.message}; `push` will refuse the card: {FIX}")
    return None
