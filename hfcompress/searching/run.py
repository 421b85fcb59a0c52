"""`hfcompress search`: finds the best chain for a model and its data, and runs the recipe of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.metrics import RowMetric
from hfcompress.distillation.teacher_quality import compare_with_chance
from hfcompress.measure.environment import environment, versions
from hfcompress.models.artifact import weights_hash
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.recipe.loader import Loaded, load_objects
from hfcompress.recipe.schema import spell_out
from hfcompress.recipe.target import Target
from hfcompress.recipe.validate import check
from hfcompress.run.directory import require_free_directory, require_ours
from hfcompress.run.runner import Run, run
from hfcompress.searching.candidate import Candidate, list_steps
from hfcompress.searching.engine import Ending, describe_power, search
from hfcompress.searching.outcome import Outcome, find_faults, list_front
from hfcompress.searching.trials import Trials
from hfcompress.searching.workshop import Workshop
from hfcompress.utils.errors import HfcompressError, did_you_mean
from hfcompress.utils.files import write_text
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.logging import log
from hfcompress.utils.registry import ComponentError

if TYPE_CHECKING:
    from hfcompress.data.task import Task

FOLDER = "search"
"""The directory of the trials, inside the run directory."""
SCHEMA = 1
"""The version of search.json."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        ending: All trials, and the best of them.
        run: The run of the best model's recipe, or of the nearest attempt; None if every trial failed.
        loaded: That recipe.
    """

    ending: Ending
    run: Run | None
    loaded: Loaded | None


def find_model(loaded: Loaded, directory: Path, storage: str | None = None) -> Found:
    """Searches for the best chain, then makes, measures and describes its model as `hfcompress run` does.

    The same call again goes on with a search that was killed, and finds a finished one done.

    Args:
        loaded: A recipe with `search:`. A leading `finetune` stage makes the source; other stages are left out.
        directory: The run directory: `final/`, the report and the recipe of the winner; the trials are in `search/`.
        storage: The database of the trials, see `Trials`.

    Raises:
        HfcompressError: for everything that the user can fix.
    """
    target = loaded.recipe.search or Target()
    if loaded.recipe.task.head == "mask":
        raise HfcompressError(
            f"a {loaded.recipe.task.type} task is judged on blocks of several rows, and a search compares row by row",
            "compress the model with a recipe, or search after it was fine-tuned for a task",
        )
    base = make_base(loaded)
    backends = list_backends(target.backends)
    require_free_directory(directory)
    folder = directory / FOLDER
    with Workshop(base, folder, target) as workshop:
        first = workshop.make_recipe(Candidate(backends[0]))
        require_ours(first, directory, fresh=False)
        check(first, download=True)
        folder.mkdir(parents=True, exist_ok=True)
        tell_power(workshop, target, require_skill(workshop))
        trials = Trials(folder, make_name(workshop, target, backends), storage)
        ending = search(workshop, trials, target, backends, list_steps(workshop.train_rows))
        write_results(workshop, ending, folder, target, backends)
        if ending.chosen is None:
            return Found(ending, None, None)
        winner = workshop.make_recipe(ending.chosen.candidate)
    return Found(ending, run(winner, directory, store=folder / "stages"), winner)


def make_base(loaded: Loaded) -> Loaded:
    """The recipe of the source alone: without the stages that the search chooses itself."""
    recipe = loaded.recipe
    own = [stage for stage in recipe.stages if not stage.compresses]
    if len(own) < len(recipe.stages):
        kinds = ", ".join(stage.kind for stage in recipe.stages if stage.compresses)
        log.info(f"search: the stages of the recipe ({kinds}) are left out; the search chooses its own")
    content = spell_out(recipe.model_copy(update={"stages": own}))
    return load_objects({**content, "search": recipe.search or Target()})


def list_backends(names: Sequence[str]) -> list[str]:
    """Lists the backends that a search tries: those named, or by default those that were made for it and run here.

    Raises:
        HfcompressError: for a backend that does not exist or is not installed.
    """
    for name in names:
        if name not in BACKENDS.names():
            fix = did_you_mean(name, BACKENDS.names())
            raise HfcompressError(f"search.backends: there is no backend '{name}'", fix)
        if problem := BACKENDS.get(name)().unavailable():
            raise HfcompressError(f"search.backends: {name}: {problem[0]}", problem[1])
    found = sorted(set(names)) or [name for name in BACKENDS.names() if _is_searched(name)]
    if not found:
        raise HfcompressError("no backend that a search tries is installed", "pip install 'hfcompress[onnx]'")
    return found


def _is_searched(name: str) -> bool:
    """True if a search tries a backend by default; False for one that cannot be imported or does not run here."""
    try:
        backend = BACKENDS.get(name)
    except ComponentError:
        return False
    return backend.searched and backend().unavailable() is None


def require_skill(workshop: Workshop) -> float:
    """Requires that the source is better than chance: else no model could lose anything against it; returns its score.

    Raises:
        HfcompressError: if it is not.
    """
    answer, features = workshop.source_answer, workshop.source_rows.encoded
    return compare_with_chance("the source", answer.predictions, answer.references, features, workshop.task)


def tell_power(workshop: Workshop, target: Target, source: float) -> None:
    """Says if the dev split is too small to rule out the accepted loss of a metric whose rows are right or wrong.

    Args:
        workshop: Knows the rows.
        target: The limits.
        source: The source's score.
    """
    metric = workshop.task.metric_function
    if not (isinstance(metric, RowMetric) and metric.right_or_wrong):
        return
    if told := describe_power(len(workshop.rows), source, target):
        log.warning(f"search: {told}; `task.dev_rows` takes more rows from train")


def make_name(workshop: Workshop, target: Target, backends: Sequence[str]) -> str:
    """Hashes everything that an outcome depends on, beside its candidate."""
    task: Task = workshop.task
    latency = workshop.loaded.recipe.measure.latency
    return hash_json(
        {
            "source": weights_hash(workshop.source.path),
            "task": task.model_dump(exclude={"dataset"}),
            "data": task.fingerprint(),
            "seed": workshop.seed,
            "versions": versions(),
            "max_drop": str(target.max_drop),
            "backends": list(backends),
            "latency": latency.model_dump(),
        }
    )


def write_results(workshop: Workshop, ending: Ending, folder: Path, target: Target, backends: Sequence[str]) -> None:
    """Writes search.json, and the recipe of each trial on the front."""
    front = {outcome.candidate for outcome in list_front(ending.outcomes)}
    trials = []
    for number, outcome in enumerate(ending.outcomes, start=1):
        name = f"trial-{number:03d}.yaml"
        if outcome.candidate in front:
            write_text(folder / name, workshop.make_recipe(outcome.candidate).document.text)
        trials.append(_describe_trial(outcome, target, name if outcome.candidate in front else None))
    answer, task = workshop.source_answer, workshop.task
    content = {
        "schema": SCHEMA,
        "target": target.model_dump(mode="json"),
        "backends": list(backends),
        "metric": task.metric_name,
        "source": task.score(answer.predictions, answer.references),
        "dev_rows": len(workshop.rows),
        "batch_sizes": workshop.loaded.recipe.measure.latency.batch_sizes,
        "seconds": round(ending.seconds, 1),
        "done": ending.done,
        "best": None if ending.best is None else ending.outcomes.index(ending.best) + 1,
        "chosen": None if ending.chosen is None else ending.outcomes.index(ending.chosen) + 1,
        "environment": environment(),
        "trials": trials,
    }
    write_text(folder / "search.json", json.dumps(content, indent=2) + "\n")


def _describe_trial(outcome: Outcome, target: Target, recipe: str | None) -> dict[str, Any]:
    return {
        **outcome.to_json(),
        "name": str(outcome.candidate),
        "speedup": outcome.speedup,
        "faults": find_faults(outcome, target),
        "recipe": recipe,
    }
