"""Runs a recipe: each stage into a directory of its own, resumed by what it depends on, then measured."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress import card, card_quantization, report
from hfcompress.base.console import say
from hfcompress.base.errors import HfcompressError
from hfcompress.base.places import forget_places, without_places
from hfcompress.data.source import data_revision, is_local, model_directory, revision_of
from hfcompress.measure.environment import environment, versions
from hfcompress.measure.measure import measure, time_again
from hfcompress.measure.verify import verify
from hfcompress.model.artifact import Artifact, open_artifact, weights_hash
from hfcompress.recipe import Loaded, check, load, resolved, stage_options
from hfcompress.stages.base import Bench, Stage, digest, on_main_process, process_state

if TYPE_CHECKING:
    from transformers import TrainerCallback

CUTS = ("kept", "vocabulary", "embedding_rank", "sparsity", "latency", "sensitivity")
"""Notes of a prune stage that the report shows."""
ROUNDED = card_quantization.NOTES
"""The same of a quantize stage."""
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
    state = process_state()
    shapes = check(loaded, download=True)
    _require_stages(loaded, only, fresh)
    on_main_process(lambda: _open(loaded, directory, fresh, max(s.bytes for s in shapes)))
    artifacts = _run_stages(loaded, directory, only, callbacks)
    state.wait_for_everyone()
    # What is left is the first process's; those that leave before it must not abort its communication threads.
    state.destroy_process_group()
    if not state.is_main_process:
        return None
    content = {
        **_measured(loaded, directory, artifacts),
        "recipe": digest(resolved(loaded.recipe)),
        "cuts": {a.stage: _noted(a, CUTS) for a in artifacts if a.kind == "prune"},
        "rounded": {a.stage: noted for a in artifacts if a.kind == "quantize" and (noted := _noted(a, ROUNDED))},
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


def _open(loaded: Loaded, directory: Path, fresh: bool, largest: int) -> None:
    """Takes the run directory, or refuses one that belongs to something else."""
    identity = {key: resolved(loaded.recipe)[key] for key in ("name", "model", "task")}
    lock = directory / "recipe.lock.json"
    if lock.is_file():
        held = _locked(lock)["recipe"]
        same = all(held.get(key) == value for key, value in identity.items())
        if not same and not (fresh and held.get("name") == loaded.recipe.name):
            differing = ", ".join(key for key, value in identity.items() if held.get(key) != value)
            raise HfcompressError(
                f"{directory} belongs to another recipe (its {differing} differs)",
                "choose another directory with --output, or start over with --fresh where the name is the same",
            )
    elif directory.exists() and not directory.is_dir():
        raise HfcompressError(f"{directory} is a file, not a directory", "choose another one with --output")
    elif directory.exists() and any(directory.iterdir()):
        raise HfcompressError(
            f"{directory} is not empty and was not made by hfcompress", "choose another directory with --output"
        )
    revisions = _revisions(loaded)
    old = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if fresh and lock.is_file() else 0
    free = old + shutil.disk_usage(next(p for p in (directory, *directory.absolute().parents) if p.exists())).free
    if free < SPACE_FACTOR * largest:
        raise HfcompressError(
            f"the disk is full: {free / 1e6:,.0f} MB are free at {directory}, a stage needs about "
            f"{SPACE_FACTOR * largest / 1e6:,.0f} MB",
            "free some space, or choose another directory with --output",
        )
    if fresh and lock.is_file():
        shutil.rmtree(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = error.filename
        raise HfcompressError(f"{place} is a file, not a directory", "choose another one with --output") from None
    write(directory / "recipe.yaml", loaded.document.text)
    content = {
        "recipe": resolved(loaded.recipe),
        "overrides": list(loaded.document.overrides),
        "revisions": revisions,
        "environment": environment(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    write(lock, json.dumps(content, indent=2) + "\n")


def _locked(lock: Path) -> dict[str, Any]:
    """The content of a recipe.lock.json."""
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfcompressError(f"{lock} is not JSON: {error}", "choose another directory with --output") from None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise HfcompressError(f"{lock} was not written by hfcompress", "choose another directory with --output")
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


def write(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it there."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _run_stages(
    loaded: Loaded, directory: Path, only: str | None, callbacks: Sequence[TrainerCallback]
) -> list[Artifact]:
    recipe = loaded.recipe
    source = open_artifact(model_directory(recipe.model), "source", "source")
    artifacts, made = [source], {"model": replace(source, stage="model", kind="model")}
    last = max(i for i, stage in enumerate(recipe.stages) if only in (None, stage.kind))
    for name, stage in zip(recipe.stage_names()[: last + 1], recipe.stages, strict=False):
        task = stage.task_of(recipe.task)
        bench = Bench(task, recipe.seed, source, made, directory / f"{name}.partial", callbacks)
        key = _resume_key(stage, artifacts[-1], bench)
        done = _finished(directory / name, key, stage)
        if done is None:
            if only not in (None, stage.kind) and stage.compresses:
                raise HfcompressError(
                    f"{name} comes first and is not done", f"run it: `hfcompress run RECIPE --only {stage.kind}`"
                )
            done = _run_stage(name, stage, artifacts[-1], bench, key, directory)
        else:
            say(f"{name}: done before")
        made[name] = done
        if stage.compresses:
            artifacts.append(done)
        else:
            source = replace(done, stage="source", kind="source")
            artifacts = [source]
    elsewhere = {n for n, stage in zip(recipe.stage_names(), recipe.stages, strict=True) if stage.task_of(None)}
    return [artifact for artifact in artifacts if artifact.stage not in elsewhere]


def _resume_key(stage: Stage, parent: Artifact, bench: Bench) -> str:
    """A hash of everything that a stage's result depends on."""
    return digest(
        {
            "stage": stage_options(stage),
            "parent": weights_hash(parent.path),
            "named": [weights_hash(bench.artifact(spec, parent).path) for spec in stage.specs().values()],
            "task": bench.task.model_dump(exclude={"dataset"}),
            "data": bench.fingerprint(),
            "seed": bench.seed,
            "versions": versions(),
            "device": process_state().device.type,
        }
    )


def _finished(path: Path, key: str, stage: Stage) -> Artifact | None:
    record = path / "stage.json"
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8")).get("key") != key:
        return None
    return open_artifact(path, path.name, stage.kind)


def _run_stage(name: str, stage: Stage, parent: Artifact, bench: Bench, key: str, directory: Path) -> Artifact:
    from transformers import set_seed

    say(f"{name}: {stage.kind}")
    start = time.perf_counter()
    on_main_process(lambda: _take(bench.directory, key))
    set_seed(bench.seed)
    with _kept_notes(bench):
        stage.run(parent, bench)
    on_main_process(lambda: _complete(name, stage, bench, key, directory, time.perf_counter() - start))
    return open_artifact(directory / name, name, stage.kind)


def _take(partial: Path, key: str) -> None:
    """Keeps an interrupted attempt at the same work, throws away one at other work."""
    mark = partial / "key"
    if partial.is_dir() and not (mark.is_file() and mark.read_text(encoding="utf-8") == key):
        shutil.rmtree(partial)
    shutil.rmtree(partial / "model", ignore_errors=True)
    partial.mkdir(exist_ok=True)
    write(mark, key)


@contextmanager
def _kept_notes(bench: Bench) -> Iterator[None]:
    """Notes survive an interruption, as the work they tell of does."""
    path = bench.directory / "notes.json"
    if path.is_file():
        bench.notes.update(json.loads(path.read_text(encoding="utf-8")))
    try:
        yield
    finally:
        if os.environ.get("RANK", "0") == "0" and bench.directory.is_dir():
            write(path, json.dumps(bench.notes))


def _complete(name: str, stage: Stage, bench: Bench, key: str, directory: Path, seconds: float) -> None:
    """Proves the saved model, then gives the stage its name."""
    model = open_artifact(bench.model_directory, name, stage.kind)
    assert bench.logits is not None
    device = "cuda" if _quantized_on_gpu(stage, model) else "cpu"
    differences = verify(model, bench.logits, bench.task.auto_class, device, bench.reading)
    record = {
        "key": key,
        "stage": stage_options(stage),
        "seconds": round(seconds, 1),
        "reload": differences,
        **bench.notes,
    }
    write(bench.model_directory / "stage.json", json.dumps(record, indent=2) + "\n")
    target, old = directory / name, directory / f"{name}.old"
    if target.exists():
        target.rename(old)
    bench.model_directory.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(bench.directory)
    told = ", ".join(f"{way} {difference:.1g}" for way, difference in differences.items())
    say(f"{name}: done in {seconds:.0f} s, reloaded in a fresh process, with difference: {told}")


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
    kept = report.read(directory) if (directory / "report.json").is_file() else {}
    if kept.get("key") == key:
        say("report: done before")
        return kept
    start = time.perf_counter()
    measured = measure(artifacts, recipe.task, recipe.measure, recipe.seed, say)
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


def _noted(made: Artifact, keys: Sequence[str]) -> dict[str, Any]:
    """What a stage noted, of what the report keeps."""
    record = json.loads((made.path / "stage.json").read_text(encoding="utf-8"))
    return {key: record[key] for key in keys if key in record}


def _finish(loaded: Loaded, directory: Path, artifacts: list[Artifact], content: dict[str, Any]) -> None:
    """Writes report, pictures, `final/` and its card."""
    report.write(content, directory)
    last = artifacts[-1]
    scratch, final, old = directory / "final.partial", directory / "final", directory / "final.old"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(last.path, scratch, ignore=shutil.ignore_patterns("stage.json", "README.md"))
    forget_places(scratch)
    write(scratch / "recipe.yaml", without_places(loaded.document.text))
    _write_card(loaded, directory, replace(last, path=scratch), content)
    if final.exists():
        final.rename(old)
    scratch.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write_card(loaded: Loaded, directory: Path, model: Artifact, content: dict[str, Any]) -> None:
    """Writes the card beside a model, with its pictures."""
    for name in report.pictures(content):
        if (directory / "plots" / name).is_file():
            shutil.copyfile(directory / "plots" / name, model.path / name)
    write(model.path / "README.md", card.render(loaded, content, model))


def measure_again(directory: Path) -> dict[str, Any]:
    """Times the models of a finished run anew, and writes report, pictures and card; all else in them stays.

    Times of a busy machine do not replace those of a quiet one.

    Returns:
        The report.

    Raises:
        HfcompressError: where the directory is no finished run, or its models are not those that were measured.
    """
    loaded, content = opened(directory)
    final = directory / "final"
    if not (final / "config.json").is_file():
        raise HfcompressError(f"{final} holds no model", "the same `hfcompress run` writes it again")
    artifacts = _measured_models(loaded, directory, content)
    recipe = loaded.recipe
    timed = time_again(artifacts, recipe.task, recipe.measure, recipe.seed, content, say)
    if report.busy(timed) and content.get("machine", {}).get("busy") is False:
        why = "; ".join(timed["machine"]["why"])
        say(f"the machine is busy now ({why}): the report keeps the times of before, when it was quiet")
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
    held, content = _locked(lock), report.read(directory)
    # The report of an earlier recipe stays until the run of this one ends.
    if content.get("recipe", digest(held["recipe"])) != digest(held["recipe"]):
        raise HfcompressError(f"the run in {directory} is not finished", "the same `hfcompress run` goes on with it")
    return load(directory / "recipe.yaml", held.get("overrides", [])), content
