"""Finishes a run: measures the models, writes the report, `final/` and its card."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import is_local
from hfcompress.measure.answers import FILE, read_answers, write_answers
from hfcompress.measure.environment import environment, versions
from hfcompress.measure.measure import measure
from hfcompress.models.artifact import Artifact, weights_hash
from hfcompress.recipe.loader import Loaded
from hfcompress.report import card, report
from hfcompress.report.judge import add_comparisons
from hfcompress.utils.files import (
    PARTIAL,
    new_directory,
    new_file,
    read_json,
    remove,
    write_text,
)
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.logging import log
from hfcompress.utils.places import shorten_places, shorten_settings

if TYPE_CHECKING:
    pass


UNMEASURED = ("margin", "slices", "seeds", "price")
"""Options that figures are judged by, and other seeds: the models need not be measured again if they change."""


def measure_models(loaded: Loaded, directory: Path, artifacts: list[Artifact]) -> dict[str, Any]:
    """Measures the models, or reads their figures from report.json if they were measured before."""
    recipe, weights = loaded.recipe, {a.stage: weights_hash(a.path) for a in artifacts}
    data = recipe.task.fingerprint(judged=True)
    key = hash_json(
        {
            "models": weights,
            # The country of the electricity changes no measured figure.
            "measure": recipe.measure.model_dump(exclude=set(UNMEASURED)) | {"energy": bool(recipe.measure.energy)},
            "seed": recipe.seed,
            "task": recipe.task.model_dump(),
            "data": data,
            "versions": versions(),
        }
    )
    kept, file, stages = read_json(directory / "report.json") or {}, directory / FILE, [a.stage for a in artifacts]
    answers = read_answers(file, stages) if kept.get("key") == key else None
    if answers is not None:
        log.info("report: done before")
        return add_comparisons(kept, answers, recipe.task, recipe.measure, recipe.seed)
    start = time.perf_counter()
    measured, answers = measure(artifacts, recipe.task, recipe.measure, recipe.seed, log.info)
    write_answers(answers, stages, file)
    content = {
        "schema": report.SCHEMA,
        "name": recipe.name,
        "key": key,
        "weights": weights,
        "data_hash": data,
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "task": {
            **recipe.task.model_dump(mode="json"),
            "split": recipe.task.judged_split(),
        },
        **measured,
    }
    return add_comparisons(content, answers, recipe.task, recipe.measure, recipe.seed)


def describe_origin(loaded: Loaded, held: dict[str, Any]) -> dict[str, Any]:
    """Describes where model and data came from: `revisions`, `license` and the data set's own name of the split.

    Args:
        loaded: The recipe.
        held: The content of recipe.lock.json.
    """
    task = loaded.recipe.task
    split = None if is_local(task.dataset) else task.table.find_hub_split(task.judged_split())
    return {"revisions": held["revisions"], "license": held["license"], "dataset_split": split}


def finish(loaded: Loaded, directory: Path, artifacts: list[Artifact], content: dict[str, Any]) -> None:
    """Writes the report, the figures, `final/` and its card."""
    report.write(content, directory)
    with new_directory(directory / "final") as final:
        write_model(loaded, directory, artifacts[-1], content, final)
    _remove_leftovers(loaded, directory, {a.stage for a in artifacts})


def write_model(
    loaded: Loaded,
    directory: Path,
    model: Artifact,
    content: dict[str, Any],
    target: Path,
    copy: Callable[[str, str], object] = shutil.copy2,
) -> None:
    """Writes a model as it is published: its files, the recipe, the card and its figures.

    Args:
        loaded: The recipe.
        directory: The run directory.
        model: The model of a stage.
        content: The report.
        target: An empty directory.
        copy: Copies one file.
    """
    ignored = shutil.ignore_patterns("stage.json", "README.md")
    shutil.copytree(model.path, target, dirs_exist_ok=True, ignore=ignored, copy_function=copy)
    shorten_settings(target)
    write_text(target / "recipe.yaml", shorten_places(loaded.document.text))
    write_card(loaded, directory, replace(model, path=target), content)


def _remove_leftovers(loaded: Loaded, directory: Path, done: set[str]) -> None:
    """Removes attempts at stages that are done, or that the recipe no longer has."""
    waiting = {f"{name}{PARTIAL}" for name in loaded.recipe.stage_names() if name not in done}
    for path in directory.glob(f"*{PARTIAL}"):
        if path.name not in waiting:
            remove(path)


def write_card(loaded: Loaded, directory: Path, model: Artifact, content: dict[str, Any]) -> None:
    """Writes the card and its figures beside a model."""
    for name in report.list_pictures(content):
        if (directory / "plots" / name).is_file():
            with new_file(model.path / name) as scratch:
                shutil.copyfile(directory / "plots" / name, scratch)
    write_text(model.path / "README.md", card.render(loaded, content, model))
