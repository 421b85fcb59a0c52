"""Compares any models on the same rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hfcompress.data.source import open_model
from hfcompress.measure.answers import Answers
from hfcompress.measure.energy import require_energy
from hfcompress.measure.environment import environment
from hfcompress.measure.measure import measure
from hfcompress.measure.rows import find_length_problems
from hfcompress.models.artifact import Artifact, read_config
from hfcompress.recipe.loader import Loaded
from hfcompress.recipe.schema import Recipe
from hfcompress.report import report
from hfcompress.report.costs import add_costs
from hfcompress.report.judge import add_comparisons
from hfcompress.report.names import find_tails
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log


def compare(models: list[str], loaded: Loaded) -> tuple[dict[str, Any], Answers]:
    """Measures models and compares them with the first.

    Args:
        models: Directories or Hub ids; `DIRECTORY:FILE.onnx` names one graph of several.
        loaded: The recipe that gives the task, `measure` and the seed.

    Returns:
        A report with one row for each model, and the answers of the models.
    """
    recipe = loaded.recipe
    labels = find_tails([model.rstrip("/") or model for model in models], least=2)
    artifacts = [open_model(model, label) for model, label in zip(models, labels, strict=True)]
    for artifact in artifacts:
        problems = recipe.task.head_problems(read_config(artifact.path))
        if problems:
            raise HfcompressError(replace(p, message=f"{artifact.stage}: {p.message}", key=()) for p in problems)
    # What cannot be measured is told before minutes of measuring.
    recipe.task.read_slices(recipe.measure.slices)
    require_energy(recipe.measure.energy)
    _require_lengths(recipe, artifacts)
    measured, answers = measure(artifacts, recipe.task, recipe.measure, recipe.seed, log.info)
    content = {
        "schema": report.SCHEMA,
        "name": f"{len(models)} models on {recipe.name}",
        "environment": environment(),
        "task": {**recipe.task.model_dump(mode="json"), "split": recipe.task.judged_split()},
        **measured,
    }
    content = add_comparisons(content, answers, recipe.task, recipe.measure, recipe.seed)
    return add_costs(content, recipe.measure), answers


def _require_lengths(recipe: Recipe, artifacts: list[Artifact]) -> None:
    """Requires that each model takes rows of the lengths that are timed."""
    lengths, longest = recipe.measure.latency.lengths, recipe.task.max_length
    problems = find_length_problems(lengths, longest, "task.max_length is")
    for stage, shape in [(each.stage, each.shape) for each in artifacts] if not problems else []:
        problems += find_length_problems(lengths, shape.usable_positions, f"{stage} takes at most") if shape else []
    if problems:
        raise HfcompressError(problems)
