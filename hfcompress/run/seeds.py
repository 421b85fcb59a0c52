"""Makes the models of a recipe with other seeds, in `RUN/seeds/SEED/`, and measures their quality.

Each is a run of its own, which resumes as any other; the models of the recipe's own seed are those that are timed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hfcompress.measure.environment import versions
from hfcompress.measure.measure import score_models
from hfcompress.models.artifact import Artifact, weights_hash
from hfcompress.recipe.loader import Loaded
from hfcompress.utils.files import read_json, write_text
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.logging import log

SCORES = "scores.json"


def find_directory(run: Path, seed: int) -> Path:
    """Returns the run directory of another seed."""
    return run / "seeds" / str(seed)


def replace_seed(loaded: Loaded, seed: int) -> Loaded:
    """Returns the recipe with another seed, and with no further ones."""
    measure = loaded.recipe.measure.model_copy(update={"seeds": None})
    overrides = (*loaded.document.overrides, "measure.seeds=null", f"seed={seed}")
    recipe = loaded.recipe.model_copy(update={"seed": seed, "measure": measure})
    return replace(loaded, recipe=recipe, document=replace(loaded.document, overrides=overrides))


def score_seeds(
    loaded: Loaded, directory: Path, models: Mapping[int, Sequence[Artifact]]
) -> dict[int, dict[str, float]]:
    """Measures the quality of the models of each seed, or reads it if they were measured before.

    Args:
        loaded: The recipe.
        directory: The run directory.
        models: The models of each other seed, the source first.

    Returns:
        By seed, the score of each model.
    """
    return {seed: _score(loaded, find_directory(directory, seed), seed, found) for seed, found in models.items()}


def _score(loaded: Loaded, directory: Path, seed: int, models: Sequence[Artifact]) -> dict[str, float]:
    recipe = loaded.recipe
    key = hash_json(
        {
            "models": {model.stage: weights_hash(model.path) for model in models},
            "device": recipe.measure.latency.device,
            "task": recipe.task.model_dump(),
            "data": recipe.task.fingerprint(judged=True),
            "versions": versions(),
        }
    )
    kept = read_json(directory / SCORES) or {}
    if kept.get("key") == key:
        log.info(f"seed {seed}: quality measured before")
        return dict(kept["scores"])
    log.info(f"seed {seed}: quality")
    scores = score_models(models, recipe.task, recipe.measure)
    named = dict(zip([model.stage for model in models], scores, strict=True))
    write_text(directory / SCORES, json.dumps({"key": key, "scores": named}, indent=2) + "\n")
    return named
