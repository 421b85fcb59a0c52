"""Opens a run directory: checks its recipe, locks it for one process, writes its recipe.lock.json."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import cache_home, data_revision, is_local, model_directory, revision_of
from hfcompress.measure.environment import environment
from hfcompress.recipe.license import ask_for_license
from hfcompress.recipe.loader import Loaded, load
from hfcompress.recipe.schema import spell_out
from hfcompress.report import report
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import (
    OLD,
    PARTIAL,
    remove,
    remove_half_files,
    require_space,
    restore,
    write_text,
)
from hfcompress.utils.hashing import hash_json
from hfcompress.utils.lock import HeldError, Lock, hold, remove_dead, require_free
from hfcompress.utils.stop import interrupt_main_thread

if TYPE_CHECKING:
    from hfcompress.data.task import Task


LOCK = ".lock"
"""The file that names the process that writes to a run directory; it exists only while a process writes."""
SPACE_FACTOR = 5
"""A stage needs about five times its model's bytes: the model, a checkpoint with two moments a weight, and a copy."""


def open_run(
    stack: ExitStack, loaded: Loaded, directory: Path, fresh: bool, largest: int, with_card: bool = True
) -> None:
    """Checks, locks and prepares the run directory; the lock lasts until the stack is closed.

    Args:
        stack: Holds the lock.
        loaded: The recipe.
        directory: The run directory.
        fresh: True to empty the directory first.
        largest: The bytes of the largest model.
        with_card: False if the run ends without a card, so that no licence is needed.
    """
    revisions = find_revisions(loaded)
    license_ = ask_for_license(loaded.recipe, revisions) if with_card else None
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
    require_ours(loaded, directory, fresh)
    if fresh:
        _clear(directory)
    content = {
        "recipe": spell_out(loaded.recipe),
        "overrides": list(loaded.document.overrides),
        "revisions": revisions,
        "license": license_,
        "environment": environment(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    write_text(directory / "recipe.lock.json", json.dumps(content, indent=2) + "\n")
    write_text(directory / "recipe.yaml", loaded.document.text)


def require_ours(loaded: Loaded, directory: Path, fresh: bool) -> None:
    """Refuses a directory that belongs to another recipe, or was not made by hfcompress."""
    if directory.exists() and not directory.is_dir():
        raise HfcompressError(f"{directory} is a file, not a directory", "choose another one with --output")
    if (directory / "recipe.lock.json").is_file():
        held = _read_held_recipe(directory, loaded)
        identity = {key: spell_out(loaded.recipe)[key] for key in ("name", "model", "task")}
        held = {**held, "task": _add_later_options(held.get("task"), loaded.recipe.task)}
        same = all(held.get(key) == value for key, value in identity.items())
        if not same and not (fresh and held.get("name") == loaded.recipe.name):
            differing = ", ".join(key for key, value in identity.items() if held.get(key) != value)
            raise HfcompressError(
                f"{directory} belongs to another recipe (its {differing} differs)",
                "choose another directory with --output, or start over with --fresh where the name is the same",
            )
    elif directory.exists() and not all(map(_is_unfinished, directory.iterdir())):
        raise HfcompressError(
            f"{directory} is not empty and was not made by hfcompress", "choose another directory with --output"
        )


def _is_unfinished(path: Path) -> bool:
    """True if a file may come from a search, or from a run that was killed before it wrote its recipe.lock.json."""
    return path.name in (LOCK, "search") or path.name.endswith(PARTIAL)


def _read_held_recipe(directory: Path, loaded: Loaded) -> Mapping[str, Any]:
    """Reads the recipe of a run directory; if its lock is damaged, accepts a verbatim copy of this recipe instead."""
    try:
        return read_lock(directory)["recipe"]
    except HfcompressError:
        kept = directory / "recipe.yaml"
        if kept.is_file() and kept.read_bytes() == loaded.document.text.encode():
            return spell_out(loaded.recipe)
        raise


def _clear(directory: Path) -> None:
    """Empties a run directory that this process holds; removes recipe.lock.json, which marks it as one, last."""
    mark = directory / "recipe.lock.json"
    for path in directory.iterdir():
        if path not in (mark, directory / LOCK):
            remove(path)
    remove(mark)


def _add_later_options(held: Any, task: Task) -> Any:
    """Adds the options of later versions, at their defaults, to a recorded task."""
    if not isinstance(held, dict):
        return held
    fields = type(task).model_fields.items()
    return {**{name: x.get_default(call_default_factory=True) for name, x in fields if name not in held}, **held}


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Locks a run directory: while the block runs, no other process writes to it.

    First it tidies up after killed processes, here and in the caches: it removes unfinished files, and a directory that
    was being replaced gets its name back.

    Raises:
        HfcompressError: if another process writes to it, at once; if the directory is removed or moved while the block
            runs, within seconds.
    """
    stop = interrupt_main_thread if threading.current_thread() is threading.main_thread() else None
    with _one_writer(directory), hold(directory.resolve() / LOCK, on_loss=stop) as lock:
        _remove_leftovers_of_a_kill(directory)
        failure = None
        try:
            yield
        except BaseException as error:
            failure = error
        if _is_lost(lock, failure):
            _remove_rest(directory)
            raise HfcompressError(
                f"{directory} was removed or moved while this run wrote to it", "start the run again"
            ) from failure
        if failure is not None:
            if isinstance(failure, Exception) and not isinstance(failure, HfcompressError):
                require_space(directory, failure)  # a library may not notice that a full disk cut a file off
            raise failure


def _remove_leftovers_of_a_kill(directory: Path) -> None:
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


def require_free_directory(directory: Path) -> None:
    """Refuses a directory that another process writes to, before any work begins."""
    with _one_writer(directory):
        require_free(directory / LOCK)


def _is_lost(lock: Lock, failure: BaseException | None) -> bool:
    """True if this run no longer has the directory; retries, since a removal may reach the lock file last."""
    for _ in range(10 if isinstance(failure, OSError | RuntimeError) else 1):
        if not lock.is_intact():
            return True
        time.sleep(0.1)
    return False


def _remove_rest(directory: Path) -> None:
    """Removes what this run wrote after its directory was removed, unless another run has begun there."""
    if (directory / "recipe.lock.json").exists() or (directory / LOCK).exists() or not directory.is_dir():
        return
    with suppress(OSError):  # the process that removes it may not be done
        for path in directory.glob(f"*{PARTIAL}"):
            remove(path)
        directory.rmdir()


def read_lock(directory: Path) -> dict[str, Any]:
    """Reads a run's recipe.lock.json.

    Raises:
        HfcompressError: if it is damaged.
    """
    lock = directory / "recipe.lock.json"
    fix = "the same `hfcompress run` as before writes it again; for another recipe choose another directory"
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfcompressError(f"{lock} is not JSON: {error}", fix) from None
    if not isinstance(content, dict) or not isinstance(content.get("recipe"), dict):
        raise HfcompressError(f"{lock} was not written by hfcompress", fix)
    return content


def find_revisions(loaded: Loaded) -> dict[str, str | None]:
    """Finds the commit of each Hub model and data set of the recipe; downloads them, before anything is written."""
    recipe = loaded.recipe
    inside = {"source", "parent", "model", *recipe.stage_names()}
    named = [recipe.model, *(spec for stage in recipe.stages for spec in stage.specs().values())]
    found = {spec: revision_of(model_directory(spec)) for spec in named if spec not in inside and not is_local(spec)}
    for task in (recipe.task, *(stage.task_of(recipe.task) for stage in recipe.stages)):
        if not is_local(task.dataset):
            found[f"datasets/{task.dataset}"] = data_revision(task.dataset, task.config, task.is_streamed)
    return found


def open_finished(directory: Path) -> tuple[Loaded, dict[str, Any]]:
    """Reads the recipe and the report of a finished run.

    Raises:
        HfcompressError: if the directory is no run, or it is not finished.
    """
    lock = directory / "recipe.lock.json"
    if not lock.is_file():
        raise HfcompressError(
            f"{directory} is not a run directory", "give what `hfcompress run` wrote, such as runs/NAME"
        )
    if not (directory / "report.json").is_file():
        raise HfcompressError(f"the run in {directory} is not finished", "the same `hfcompress run` goes on with it")
    held, content = read_lock(directory), report.read(directory)
    # Until the run of this recipe ends, the report of an earlier one stays.
    if content.get("recipe", hash_json(held["recipe"])) != hash_json(held["recipe"]):
        raise HfcompressError(f"the run in {directory} is not finished", "the same `hfcompress run` goes on with it")
    return load(directory / "recipe.yaml", held.get("overrides", [])), content
