"""Runs a recipe: each stage writes a directory of its own, and is skipped if that is done; then measures the models."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import Stage, StageContext, StageResult
from hfcompress.data.source import model_directory
from hfcompress.measure.verify import verify
from hfcompress.models.artifact import Artifact, open_artifact
from hfcompress.recipe.loader import Loaded
from hfcompress.recipe.schema import Recipe, spell_out, spell_out_stage
from hfcompress.recipe.validate import check
from hfcompress.report.costs import add_costs
from hfcompress.report.provenance import collect_history
from hfcompress.report.sections import collect_facts
from hfcompress.report.seeds import add_seeds
from hfcompress.run.directory import open_run, read_lock, require_free_directory, require_ours
from hfcompress.run.effort import Sums, collect_effort, count_effort
from hfcompress.run.finish import describe_origin, finish, measure_models
from hfcompress.run.push import push
from hfcompress.run.resume import KEY, begin_attempt, find_finished, make_key, read_mark
from hfcompress.run.seeds import find_directory, replace_seed, score_seeds
from hfcompress.utils.distributed import on_main_process, process_state
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.files import (
    new_directory,
    read_json,
    remove,
    replace_directory,
    write_text,
)
from hfcompress.utils.hashing import hash_files, hash_json
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        directory: `runs/<name>`.
        artifacts: The models of the stages, the source first.
        report: The report's content.
        commit: The address of the commit that published the model, with `hub: {push: true}`.
        push_problem: The reason why it could not be published.
    """

    directory: Path
    artifacts: list[Artifact]
    report: dict[str, Any]
    commit: str | None = None
    push_problem: Problem | None = None


def run(
    loaded: Loaded,
    directory: Path,
    only: str | None = None,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    store: Path | None = None,
) -> Run | None:
    """Runs the stages that are not done yet, measures all models, and writes report and card.

    Args:
        loaded: The recipe.
        directory: The run directory; it is created if it does not exist.
        only: Run only the stages of this kind; those before them must be done. A leading finetune always runs.
        fresh: Start over instead of resuming.
        callbacks: `transformers` callbacks for every training.
        store: A directory that may hold finished stages, as `store/KEY/NAME`; they are copied, not made again.

    Returns:
        The run, on the first process of a distributed run; None on the others.

    Raises:
        HfcompressError: for every mistake that the user can fix.
    """
    with ExitStack() as stack:
        on_main_process(lambda: require_free_directory(directory))
        on_main_process(lambda: require_ours(loaded, directory, fresh))
        _require_any_stage(loaded)
        shapes = check(loaded, download=True)
        _require_stages(loaded, only, fresh)
        on_main_process(lambda: open_run(stack, loaded, directory, fresh, max(s.bytes for s in shapes)))
        finished = _run(loaded, directory, only, callbacks, store)
        if finished is None or not loaded.recipe.hub.push or not _is_whole(loaded, only):
            return finished
        return _push(finished)


def _push(finished: Run) -> Run:
    """Publishes a finished run; the run stays what it is if that fails."""
    log.info(f"push: {finished.directory}")
    try:
        return replace(finished, commit=push(finished.directory))
    except HfcompressError as error:
        problem, fix = error.problems[0].message, error.problems[0].fix
    except Exception as error:
        problem, fix = f"{type(error).__name__}: {error}", ""
    command = f"`hfcompress push {finished.directory}`"
    fix = f"{fix}; then {command} publishes it" if fix else f"{command} tries again"
    return replace(finished, push_problem=Problem(f"the run is finished, but not published: {problem}", fix))


def make_models(loaded: Loaded, directory: Path, callbacks: Sequence[TrainerCallback] = ()) -> list[Artifact]:
    """Runs the stages of a recipe, without measuring and without a report or card.

    Args:
        loaded: The recipe.
        directory: The run directory.
        callbacks: `transformers` callbacks for every training.

    Returns:
        The model of each stage, the source first; on every process.
    """
    with ExitStack() as stack:
        on_main_process(lambda: require_ours(loaded, directory, fresh=False))
        shapes = check(loaded, download=True)
        on_main_process(lambda: open_run(stack, loaded, directory, False, max(s.bytes for s in shapes), False))
        return run_stages(loaded, lambda name, _: directory / name, None, callbacks)


def _run(
    loaded: Loaded, directory: Path, only: str | None, callbacks: Sequence[TrainerCallback], store: Path | None
) -> Run | None:
    def place(name: str, key: str) -> Path:
        target = directory / name
        kept = store / key / name if store else target
        held = (read_json(target / "stage.json") or {}).get("key")
        if store and kept.is_dir() and held != key:
            with new_directory(target) as scratch:
                shutil.copytree(kept, scratch, dirs_exist_ok=True)
        return target

    state = process_state()
    artifacts = run_stages(loaded, place, only, callbacks)
    others = _make_with_other_seeds(loaded, directory, callbacks) if _is_whole(loaded, only) else {}
    state.wait_for_everyone()
    # The first process does the rest; the others end before it and must not abort its communication threads.
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    measured = measure_models(loaded, directory, artifacts)
    content = {
        **add_seeds(measured, loaded.recipe, score_seeds(loaded, directory, others)),
        **describe_origin(loaded, read_lock(directory)),
        "recipe": hash_json(spell_out(loaded.recipe)),
        **collect_facts(artifacts),
        **collect_history(directory, loaded.recipe.stage_names()),
        "made": collect_effort(directory, loaded.recipe.stage_names()[: _find_last(loaded.recipe, only) + 1]),
    }
    content = add_costs(content, loaded.recipe.measure)
    finish(loaded, directory, artifacts, content)
    return Run(directory, artifacts, content)


def _is_whole(loaded: Loaded, only: str | None) -> bool:
    """True if a run with `--only` ends with the last stage of the recipe."""
    return only in (None, loaded.recipe.stages[-1].kind)


def _make_with_other_seeds(
    loaded: Loaded, directory: Path, callbacks: Sequence[TrainerCallback]
) -> dict[int, list[Artifact]]:
    """Makes the models with each other seed of the recipe, in a run directory of its own."""
    found = {}
    for seed in loaded.recipe.list_seeds()[1:]:
        log.info(f"seed {seed}: {find_directory(directory, seed)}")
        found[seed] = make_models(replace_seed(loaded, seed), find_directory(directory, seed), callbacks)
    return found


def _require_any_stage(loaded: Loaded) -> None:
    if not loaded.recipe.stages:
        raise HfcompressError(
            "the recipe has no stages", f"`hfcompress search {loaded.document.path}` finds them, by its `search:`"
        )


def _require_stages(loaded: Loaded, only: str | None, fresh: bool) -> None:
    """Requires that `only` names a stage, and that `--fresh` does not remove stages that it needs."""
    kinds = [stage.kind for stage in loaded.recipe.stages]
    if only is None:
        return
    if only not in kinds:
        raise HfcompressError(f"the recipe has no {only} stage", f"it has: {', '.join(dict.fromkeys(kinds))}")
    last = max(index for index, kind in enumerate(kinds) if kind == only)
    if fresh and any(stage.compresses and stage.kind != only for stage in loaded.recipe.stages[:last]):
        raise HfcompressError(
            f"--fresh throws away the stages before {only}, which --only {only} does not run", "leave one of them out"
        )


def _find_last(recipe: Recipe, only: str | None) -> int:
    """Finds the index of the last stage that runs; -1 if there is no stage."""
    return max((i for i, stage in enumerate(recipe.stages) if only in (None, stage.kind)), default=-1)


def run_stages(
    loaded: Loaded,
    place: Callable[[str, str], Path],
    only: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[Artifact]:
    """Runs the stages of a recipe that are not done yet.

    Args:
        loaded: The recipe.
        place: Gives the directory of a stage by its name and its key, see `make_key`; the directory above it exists.
        only: Run only the stages of this kind.
        callbacks: `transformers` callbacks for every training.

    Returns:
        The source and the model of each stage, on every process.
    """
    recipe = loaded.recipe
    source = open_artifact(model_directory(recipe.model), "source", "source")
    artifacts, made = [source], {"model": replace(source, stage="model", kind="model")}
    for name, stage in zip(recipe.stage_names()[: _find_last(recipe, only) + 1], recipe.stages, strict=False):
        task = stage.task_of(recipe.task)
        context = StageContext(task, recipe.seed, source, made, Path(f"{name}.partial"), callbacks)
        key = make_key(stage, artifacts[-1], context)
        target = place(name, key)
        context.directory = target.with_name(f"{target.name}.partial")
        done = find_finished(target, key, stage)
        if done is not None:
            log.info(f"{name}: done before")
            on_main_process(partial(remove, context.directory))
        else:
            if only not in (None, stage.kind) and stage.compresses:
                raise HfcompressError(
                    f"{name} comes first and is not done", f"run it: `hfcompress run RECIPE --only {stage.kind}`"
                )
            energy = recipe.measure.energy is not None
            done = _run_stage(name, stage, artifacts[-1], context, key, target, energy)
        made[name] = done
        if stage.compresses:
            artifacts.append(done)
        else:
            source = replace(done, stage="source", kind="source")
            artifacts = [source]
    stages = zip(recipe.stage_names(), recipe.stages, strict=True)
    elsewhere = {name for name, stage in stages if stage.task_of(recipe.task) is not recipe.task}
    return [artifact for artifact in artifacts if artifact.stage not in elsewhere]


def _run_stage(
    name: str, stage: Stage, parent: Artifact, context: StageContext, key: str, target: Path, energy: bool
) -> Artifact:
    from transformers import set_seed

    log.info(f"{name}: {stage.kind}")
    on_main_process(lambda: begin_attempt(context.directory, key))
    with count_effort(context.directory, energy) as effort:
        set_seed(context.seed)
        result = stage.run(parent, context)
    sums = effort.sums if effort else Sums()
    on_main_process(lambda: _complete(name, stage, context, result, key, target, sums))
    return open_artifact(target, name, stage.kind)


def _complete(
    name: str, stage: Stage, context: StageContext, result: StageResult, key: str, target: Path, sums: Sums
) -> None:
    """Checks the saved model in a fresh process, then gives the stage's directory its name."""
    mark = context.directory / KEY
    if read_mark(mark) != key:  # the run directory was removed or moved, and saving made this one again
        raise FileNotFoundError(errno.ENOENT, "the directory of the stage is gone", str(mark))
    model = open_artifact(result.directory, name, stage.kind)
    assert result.logits is not None
    device = "cuda" if _may_have_run_on_gpu(stage, model) else "cpu"
    differences = verify(model, result.logits, context.task.auto_class, device, result.reading)
    record = {
        "key": key,
        "stage": spell_out_stage(stage),
        "seconds": round(sums.seconds, 1),
        "effort": asdict(sums),
        "reload": differences,
        "files": hash_files(result.directory),
        **result.facts,
    }
    write_text(result.directory / "stage.json", json.dumps(record, indent=2) + "\n")
    replace_directory(result.directory, target)
    remove(context.directory)
    told = ", ".join(f"{way} {difference:.1g}" for way, difference in differences.items())
    log.info(f"{name}: done in {sums.seconds:.0f} s, reloaded in a fresh process, with difference: {told}")


def _may_have_run_on_gpu(stage: Stage, model: Artifact) -> bool:
    """True if the model in memory may have run on a GPU; False for a backend that runs on CPUs only."""
    import torch

    return "cuda" in stage.runs_on and model.runtime == "torch" and torch.cuda.is_available()
