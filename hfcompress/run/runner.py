"""Runs a recipe: each stage into a directory of its own, resumed by what it depends on, then measured."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import Stage, StageContext, StageResult
from hfcompress.data.source import cache_home, data_revision, is_local, model_directory, revision_of
from hfcompress.measure.environment import environment, versions
from hfcompress.measure.measure import measure, time_again
from hfcompress.measure.verify import verify
from hfcompress.models.artifact import Artifact, open_artifact, weights_hash
from hfcompress.recipe.loader import Loaded, load
from hfcompress.recipe.schema import spell_out, spell_out_stage
from hfcompress.recipe.validate import check
from hfcompress.report import card, report
from hfcompress.report.sections import collect_facts
from hfcompress.utils.distributed import on_main_process, process_state
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import (
    OLD,
    PARTIAL,
    file_hash,
    hashes,
    new_directory,
    new_file,
    read_json,
    remove,
    remove_half_files,
    replace_directory,
    require_space,
    restore,
    write_text,
)
from hfcompress.utils.hashing import digest
from hfcompress.utils.lock import HeldError, Lock, hold, remove_dead, require_free
from hfcompress.utils.logging import log
from hfcompress.utils.places import forget_places, without_places
from hfcompress.utils.stop import interrupt_main_thread

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from hfcompress.data.task import Task

LOCK = ".lock"
"""The file in a run directory that says who writes to it, and is there for as long as somebody does."""
KEY = "key"
"""The file in a stage's working directory that says what it is an attempt at."""
SPACE_FACTOR = 5
"""A stage writes its model, a checkpoint with two moments a weight, and a copy: five times its bytes, roughly."""


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        directory: `runs/<name>`.
        artifacts: What the finished stages made, the source first.
        report: The report's content.
    """

    directory: Path
    artifacts: list[Artifact]
    report: dict[str, Any]


def run(
    loaded: Loaded,
    directory: Path,
    only: str | None = None,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run | None:
    """Runs what is not done yet, measures all of it and writes report and card.

    Args:
        loaded: The recipe.
        directory: The run directory; made where it does not exist.
        only: Run the stages of this kind alone; those before them must be done. A leading finetune always runs.
        fresh: Start over instead of resuming.
        callbacks: `transformers` callbacks that every training run takes on.

    Returns:
        The run, on the first process of a distributed run; None on the others.

    Raises:
        HfcompressError: for whatever the user can mend.
    """
    with ExitStack() as stack:
        on_main_process(lambda: _require_free(directory))
        on_main_process(lambda: _require_ours(loaded, directory, fresh))
        shapes = check(loaded, download=True)
        _require_stages(loaded, only, fresh)
        on_main_process(lambda: _open(stack, loaded, directory, fresh, max(s.bytes for s in shapes)))
        return _run(loaded, directory, only, callbacks)


def make_models(loaded: Loaded, directory: Path, callbacks: Sequence[TrainerCallback] = ()) -> list[Artifact]:
    """Runs the stages of a recipe alone: nothing is measured, and no report or card is written.

    Args:
        loaded: The recipe.
        directory: The run directory.
        callbacks: `transformers` callbacks that every training run takes on.

    Returns:
        The model of each stage, the source first; on every process.
    """
    with ExitStack() as stack:
        on_main_process(lambda: _require_ours(loaded, directory, fresh=False))
        shapes = check(loaded, download=True)
        on_main_process(lambda: _open(stack, loaded, directory, False, max(s.bytes for s in shapes)))
        return _run_stages(loaded, directory, None, callbacks)


def _run(loaded: Loaded, directory: Path, only: str | None, callbacks: Sequence[TrainerCallback]) -> Run | None:
    state = process_state()
    artifacts = _run_stages(loaded, directory, only, callbacks)
    state.wait_for_everyone()
    # What is left is the first process's; those that leave before it must not abort its communication threads.
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    content = {
        **_measured(loaded, directory, artifacts),
        "recipe": digest(spell_out(loaded.recipe)),
        **collect_facts(artifacts),
    }
    _finish(loaded, directory, artifacts, content)
    return Run(directory, artifacts, content)


def _require_stages(loaded: Loaded, only: str | None, fresh: bool) -> None:
    """Passes where there is something to run, and `--fresh` leaves what it needs."""
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


def _require_ours(loaded: Loaded, directory: Path, fresh: bool) -> None:
    """Refuses a directory that belongs to something else."""
    if directory.exists() and not directory.is_dir():
        raise HfcompressError(f"{directory} is a file, not a directory", "choose another one with --output")
    if (directory / "recipe.lock.json").is_file():
        held = _held_recipe(directory, loaded)
        identity = {key: spell_out(loaded.recipe)[key] for key in ("name", "model", "task")}
        held = {**held, "task": _with_later_options(held.get("task"), loaded.recipe.task)}
        same = all(held.get(key) == value for key, value in identity.items())
        if not same and not (fresh and held.get("name") == loaded.recipe.name):
            differing = ", ".join(key for key, value in identity.items() if held.get(key) != value)
            raise HfcompressError(
                f"{directory} belongs to another recipe (its {differing} differs)",
                "choose another directory with --output, or start over with --fresh where the name is the same",
            )
    elif directory.exists() and not all(map(_begun, directory.iterdir())):
        raise HfcompressError(
            f"{directory} is not empty and was not made by hfcompress", "choose another directory with --output"
        )


def _begun(path: Path) -> bool:
    """Whether a file is what a run leaves that was killed before it wrote its recipe.lock.json."""
    return path.name == LOCK or path.name.endswith(PARTIAL)


def _held_recipe(directory: Path, loaded: Loaded) -> Mapping[str, Any]:
    """The recipe of a run directory; where its lock is damaged, a verbatim copy of this recipe will do."""
    try:
        return locked(directory)["recipe"]
    except HfcompressError:
        kept = directory / "recipe.yaml"
        if kept.is_file() and kept.read_bytes() == loaded.document.text.encode():
            return spell_out(loaded.recipe)
        raise


def _open(stack: ExitStack, loaded: Loaded, directory: Path, fresh: bool, largest: int) -> None:
    """Takes the run directory, for as long as the stack is open."""
    revisions = _revisions(loaded)
    old = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if fresh and directory.is_dir() else 0
    free = old + shutil.disk_usage(next(p for p in (directory, *directory.absolute().parents) if p.exists())).free
    if free < SPACE_FACTOR * largest:
        raise HfcompressError(
            f"the disk is full: {free / 1e6:,.0f} MB are free at {directory}, a stage needs about "
            f"{SPACE_FACTOR * largest / 1e6:,.0f} MB",
            "free some space, or choose another directory with --output",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = error.filename
        raise HfcompressError(f"{place} is a file, not a directory", "choose another one with --output") from None
    stack.enter_context(exclusive(directory))
    _require_ours(loaded, directory, fresh)
    if fresh:
        _clear(directory)
    content = {
        "recipe": spell_out(loaded.recipe),
        "overrides": list(loaded.document.overrides),
        "revisions": revisions,
        "environment": environment(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    write_text(directory / "recipe.lock.json", json.dumps(content, indent=2) + "\n")
    write_text(directory / "recipe.yaml", loaded.document.text)


def _clear(directory: Path) -> None:
    """Empties a run directory that this process holds; last the file that says that it is one."""
    mark = directory / "recipe.lock.json"
    for path in directory.iterdir():
        if path not in (mark, directory / LOCK):
            remove(path)
    remove(mark)


def _with_later_options(held: Any, task: Task) -> Any:
    """A task as it was recorded, with the options that a later version added, at their defaults."""
    if not isinstance(held, dict):
        return held
    fields = type(task).model_fields.items()
    return {**{name: x.get_default(call_default_factory=True) for name, x in fields if name not in held}, **held}


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """This process alone writes to a run directory, for as long as the block lasts.

    What a killed process left is put in order first, here and in the caches: half files go, a directory that was being
    replaced gets its name back.

    Raises:
        HfcompressError: at once, where another process writes to it; within seconds, where the directory is removed
            or moved meanwhile.
    """
    stop = interrupt_main_thread if threading.current_thread() is threading.main_thread() else None
    with _one_writer(directory), hold(directory.resolve() / LOCK, on_loss=stop) as lock:
        _tidy(directory)
        failure = None
        try:
            yield
        except BaseException as error:
            failure = error
        if _lost(lock, failure):
            _remove_remade(directory)
            raise HfcompressError(
                f"{directory} was removed or moved while this run wrote to it", "start the run again"
            ) from failure
        if failure is not None:
            if isinstance(failure, Exception) and not isinstance(failure, HfcompressError):
                require_space(directory, failure)  # a library may not notice that a file was cut off
            raise failure


def _tidy(directory: Path) -> None:
    for place in (directory, directory / "plots"):
        remove_half_files(place)
    for old in (directory / f"final{OLD}", *directory.glob(f"[0-9][0-9]-*{OLD}")):
        restore(old.with_suffix(""))
    for cache in cache_home().glob("*/"):
        remove_dead(cache)


@contextmanager
def _one_writer(directory: Path) -> Iterator[None]:
    try:
        yield
    except HeldError as error:
        raise HfcompressError(
            f"another run writes to {directory}: {error}",
            "wait until it has ended, or choose another directory with --output",
        ) from None


def _require_free(directory: Path) -> None:
    """Refuses a directory that another process writes to, before any time is spent."""
    with _one_writer(directory):
        require_free(directory / LOCK)


def _lost(lock: Lock, failure: BaseException | None) -> bool:
    """Whether the directory is no longer this run's; one that is being removed loses its other files first, perhaps."""
    for _ in range(10 if isinstance(failure, OSError | RuntimeError) else 1):
        if not lock.intact():
            return True
        time.sleep(0.1)
    return False


def _remove_remade(directory: Path) -> None:
    """Removes what this run wrote to its place after the directory was removed, unless another run has begun there."""
    if (directory / "recipe.lock.json").exists() or (directory / LOCK).exists() or not directory.is_dir():
        return
    with suppress(OSError):  # whoever removes it may still be at it
        for path in directory.glob(f"*{PARTIAL}"):
            remove(path)
        directory.rmdir()


def locked(directory: Path) -> dict[str, Any]:
    """The content of a run's recipe.lock.json.

    Raises:
        HfcompressError: where it is damaged.
    """
    lock = directory / "recipe.lock.json"
    fix = "the same `hfcompress run` as before writes it anew; for another recipe choose another directory"
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfcompressError(f"{lock} is not JSON: {error}", fix) from None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise HfcompressError(f"{lock} was not written by hfcompress", fix)
    return content


def _revisions(loaded: Loaded) -> dict[str, str | None]:
    """The commit of each Hub model and data set that the recipe names; fetches them, before anything is written."""
    recipe = loaded.recipe
    inside = {"source", "parent", "model", *recipe.stage_names()}
    named = [recipe.model, *(spec for stage in recipe.stages for spec in stage.specs().values())]
    found = {spec: revision_of(model_directory(spec)) for spec in named if spec not in inside and not is_local(spec)}
    for task in (recipe.task, *(stage.task_of(recipe.task) for stage in recipe.stages)):
        if not is_local(task.dataset):
            found[f"datasets/{task.dataset}"] = data_revision(task.dataset, task.config, task.streamed)
    return found


def _run_stages(
    loaded: Loaded, directory: Path, only: str | None, callbacks: Sequence[TrainerCallback]
) -> list[Artifact]:
    recipe = loaded.recipe
    source = open_artifact(model_directory(recipe.model), "source", "source")
    artifacts, made = [source], {"model": replace(source, stage="model", kind="model")}
    last = max(i for i, stage in enumerate(recipe.stages) if only in (None, stage.kind))
    for name, stage in zip(recipe.stage_names()[: last + 1], recipe.stages, strict=False):
        task = stage.task_of(recipe.task)
        context = StageContext(task, recipe.seed, source, made, directory / f"{name}.partial", callbacks)
        key = _resume_key(stage, artifacts[-1], context)
        done = _finished(directory / name, key, stage)
        if done is not None:
            log.info(f"{name}: done before")
            on_main_process(partial(remove, context.directory))
        else:
            if only not in (None, stage.kind) and stage.compresses:
                raise HfcompressError(
                    f"{name} comes first and is not done", f"run it: `hfcompress run RECIPE --only {stage.kind}`"
                )
            done = _run_stage(name, stage, artifacts[-1], context, key, directory)
        made[name] = done
        if stage.compresses:
            artifacts.append(done)
        else:
            source = replace(done, stage="source", kind="source")
            artifacts = [source]
    stages = zip(recipe.stage_names(), recipe.stages, strict=True)
    elsewhere = {name for name, stage in stages if stage.task_of(recipe.task) is not recipe.task}
    return [artifact for artifact in artifacts if artifact.stage not in elsewhere]


def _resume_key(stage: Stage, parent: Artifact, context: StageContext) -> str:
    """A hash of everything that a stage's result depends on."""
    return digest(
        {
            "stage": spell_out_stage(stage),
            "parent": weights_hash(parent.path),
            "named": [weights_hash(context.artifact(spec, parent).path) for spec in stage.specs().values()],
            "task": context.task.model_dump(exclude={"dataset"}),
            "data": context.fingerprint(),
            "seed": context.seed,
            "versions": versions(),
            "device": process_state().device.type,
        }
    )


def _finished(path: Path, key: str, stage: Stage) -> Artifact | None:
    """What a stage made, where it is done.

    Raises:
        HfcompressError: where its files are no longer those that it made.
    """
    record = read_json(path / "stage.json")
    if record is None and path.is_dir():
        log.info(f"{path.name} is made anew: its stage.json is missing or damaged")
    if record is None or record.get("key") != key:
        return None
    for name, expected in record.get("files", {}).items():
        file = path / name
        if not file.is_file() or file_hash(file) != expected:
            raise HfcompressError(
                f"{file} is {'damaged or was changed' if file.is_file() else 'missing'}",
                f"remove {path}, and the same command makes it anew; or run with --output elsewhere",
            )
    return open_artifact(path, path.name, stage.kind)


def _run_stage(name: str, stage: Stage, parent: Artifact, context: StageContext, key: str, directory: Path) -> Artifact:
    from transformers import set_seed

    log.info(f"{name}: {stage.kind}")
    start = time.perf_counter()
    on_main_process(lambda: _take(context.directory, key))
    set_seed(context.seed)
    result = stage.run(parent, context)
    on_main_process(lambda: _complete(name, stage, context, result, key, directory, time.perf_counter() - start))
    return open_artifact(directory / name, name, stage.kind)


def _take(folder: Path, key: str) -> None:
    """Keeps an interrupted attempt at the same work; removes one at other work."""
    mark = folder / KEY
    if folder.is_dir() and _text(mark) != key:
        remove(folder)
    remove(folder / "model")
    folder.mkdir(exist_ok=True)
    remove_half_files(folder)
    write_text(mark, key)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _complete(
    name: str, stage: Stage, context: StageContext, result: StageResult, key: str, directory: Path, seconds: float
) -> None:
    """Checks the saved model in a fresh process, then gives the stage's directory its name."""
    mark = context.directory / KEY
    if _text(mark) != key:  # saving made the directory again, in a run that was removed or moved
        raise FileNotFoundError(errno.ENOENT, "the directory of the stage is gone", str(mark))
    model = open_artifact(result.directory, name, stage.kind)
    assert result.logits is not None
    device = "cuda" if _quantized_on_gpu(stage, model) else "cpu"
    differences = verify(model, result.logits, context.task.auto_class, device, result.reading)
    record = {
        "key": key,
        "stage": spell_out_stage(stage),
        "seconds": round(seconds, 1),
        "reload": differences,
        "files": hashes(result.directory),
        **result.facts,
    }
    write_text(result.directory / "stage.json", json.dumps(record, indent=2) + "\n")
    replace_directory(result.directory, directory / name)
    remove(context.directory)
    told = ", ".join(f"{way} {difference:.1g}" for way, difference in differences.items())
    log.info(f"{name}: done in {seconds:.0f} s, reloaded in a fresh process, with difference: {told}")


def _quantized_on_gpu(stage: Any, model: Artifact) -> bool:
    """Whether the model in memory may have run on a GPU; one of a backend for CPUs alone did not."""
    import torch

    return (
        stage.kind == "quantize"
        and model.runtime == "torch"
        and "cuda" in stage.backend.runs_on
        and torch.cuda.is_available()
    )


def _measured(loaded: Loaded, directory: Path, artifacts: list[Artifact]) -> dict[str, Any]:
    recipe, weights = loaded.recipe, {a.stage: weights_hash(a.path) for a in artifacts}
    key = digest(
        {
            "models": weights,
            "measure": recipe.measure.model_dump(),
            "seed": recipe.seed,
            "task": recipe.task.model_dump(),
            "data": recipe.task.fingerprint(judged=True),
            "versions": versions(),
        }
    )
    kept = read_json(directory / "report.json") or {}
    if kept.get("key") == key:
        log.info("report: done before")
        return kept
    start = time.perf_counter()
    measured = measure(artifacts, recipe.task, recipe.measure, recipe.seed, log.info)
    return {
        "schema": 1,
        "name": recipe.name,
        "key": key,
        "weights": weights,
        "environment": environment(),
        "seconds": round(time.perf_counter() - start, 1),
        "task": {
            **recipe.task.model_dump(mode="json"),
            "split": recipe.task.judged_split(),
        },
        **measured,
    }


def _finish(loaded: Loaded, directory: Path, artifacts: list[Artifact], content: dict[str, Any]) -> None:
    """Writes report, pictures, `final/` and its card."""
    report.write(content, directory)
    last = artifacts[-1]
    with new_directory(directory / "final") as final:
        shutil.copytree(last.path, final, dirs_exist_ok=True, ignore=shutil.ignore_patterns("stage.json", "README.md"))
        forget_places(final)
        write_text(final / "recipe.yaml", without_places(loaded.document.text))
        _write_card(loaded, directory, replace(last, path=final), content)
    _remove_leftovers(loaded, directory, {a.stage for a in artifacts})


def _remove_leftovers(loaded: Loaded, directory: Path, done: set[str]) -> None:
    """Removes attempts at stages that the recipe no longer has, or that are done."""
    waiting = {f"{name}{PARTIAL}" for name in loaded.recipe.stage_names() if name not in done}
    for path in directory.glob(f"*{PARTIAL}"):
        if path.name not in waiting:
            remove(path)


def _write_card(loaded: Loaded, directory: Path, model: Artifact, content: dict[str, Any]) -> None:
    """Writes the card beside a model, with its pictures."""
    for name in report.pictures(content):
        if (directory / "plots" / name).is_file():
            with new_file(model.path / name) as scratch:
                shutil.copyfile(directory / "plots" / name, scratch)
    write_text(model.path / "README.md", card.render(loaded, content, model))


def measure_again(directory: Path) -> dict[str, Any]:
    """Times the models of a finished run anew, and writes report, pictures and card; all else in them stays.

    Times of a busy machine do not replace those of a quiet one.

    Returns:
        The report.

    Raises:
        HfcompressError: where the directory is no finished run, or its models are not those that were measured.
    """
    opened(directory)
    with exclusive(directory):
        return _measured_again(directory)


def _measured_again(directory: Path) -> dict[str, Any]:
    loaded, content = opened(directory)
    final = directory / "final"
    if not (final / "config.json").is_file():
        raise HfcompressError(f"{final} holds no model", "the same `hfcompress run` writes it again")
    artifacts = _measured_models(loaded, directory, content)
    recipe = loaded.recipe
    timed = time_again(artifacts, recipe.task, recipe.measure, recipe.seed, content, log.info)
    if report.busy(timed) and content.get("machine", {}).get("busy") is False:
        why = "; ".join(timed["machine"]["why"])
        log.info(f"the machine is busy now ({why}): the report keeps the times of before, when it was quiet")
        return content
    content = timed
    report.write(content, directory)
    _write_card(loaded, directory, open_artifact(final, artifacts[-1].stage, artifacts[-1].kind), content)
    return content


def _measured_models(loaded: Loaded, directory: Path, content: dict[str, Any]) -> list[Artifact]:
    """The models of a report's rows, in order.

    Raises:
        HfcompressError: where one is not there, or is not the one that was measured.
    """
    recipe = loaded.recipe
    tuned = [n for n, stage in zip(recipe.stage_names(), recipe.stages, strict=True) if not stage.compresses]
    places = {name: directory / name for name in recipe.stage_names()}
    places["source"] = directory / tuned[-1] if tuned else model_directory(recipe.model)
    artifacts = []
    for row in content["rows"]:
        place = places[row["stage"]]
        if not (place / "config.json").is_file():
            raise HfcompressError(f"{place} holds no model", "the same `hfcompress run` makes it again")
        made = open_artifact(place, row["stage"], row["kind"])
        # Reports of earlier versions know the weights by their size alone.
        known = content["weights"][made.stage] if "weights" in content else row["disk_bytes"]
        if known != (weights_hash(place) if "weights" in content else made.disk_bytes):
            raise HfcompressError(
                f"{place} is not the model that the report is of", "the same `hfcompress run` measures it anew"
            )
        artifacts.append(made)
    return artifacts


def opened(directory: Path) -> tuple[Loaded, dict[str, Any]]:
    """The recipe and the report of a finished run.

    Raises:
        HfcompressError: where the directory is no run, or it is not finished.
    """
    lock = directory / "recipe.lock.json"
    if not lock.is_file():
        raise HfcompressError(
            f"{directory} is not a run directory", "give what `hfcompress run` wrote, such as runs/NAME"
        )
    if not (directory / "report.json").is_file():
        raise HfcompressError(f"the run in {directory} is not finished", "the same `hfcompress run` goes on with it")
    held, content = locked(directory), report.read(directory)
    # The report of an earlier recipe stays until the run of this one ends.
    if content.get("recipe", digest(held["recipe"])) != digest(held["recipe"]):
        raise HfcompressError(f"the run in {directory} is not finished", "the same `hfcompress run` goes on with it")
    return load(directory / "recipe.yaml", held.get("overrides", [])), content
