"""Publishes a run's final model, or that of one stage, and its card, in one commit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hfcompress.data.hub import SHOWN, hub_calls
from hfcompress.models.artifact import Artifact
from hfcompress.models.weights import ADAPTER, FOLDERS, openvino_files
from hfcompress.recipe.license import FIX
from hfcompress.recipe.loader import Loaded
from hfcompress.report.snippet import UNNAMED
from hfcompress.run.again import open_measured
from hfcompress.run.directory import open_finished
from hfcompress.run.finish import write_model
from hfcompress.utils.card_metadata import require_hub_id
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import without_tokens

SUFFIXES = frozenset({".json", ".safetensors", ".onnx", ".txt", ".model", ".codes", ".spm", ".tiktoken", ".md", ".png",
                      ".py", ".yaml", ".jinja"})  # fmt: skip
EXTERNAL = re.compile(r"\.onnx(_data|\.data)(_\d+)?$")
"""Files with the weights of a graph that is too large to contain them."""
PATH_IN_CODE = re.compile(r'^(const )?path = "[^"\n]*"', re.MULTILINE)
"""The lines of a card's code that name the repository."""
LEFT_OUT = frozenset({"stage.json", "training_args.bin"})
SMALL = 10_000_000
"""Largest size, in bytes, of a file that is read before anything is sent, so that it cannot change meanwhile."""


@dataclass(frozen=True)
class Upload:
    """A file to push.

    Attributes:
        name: Its name in the repository.
        path: Its path here.
        size: Its size in bytes.
        changed: The time of its last change, in nanoseconds.
    """

    name: str
    path: Path
    size: int
    changed: int

    def require_unchanged(self) -> None:
        """Requires that the file has not changed since it was listed.

        Raises:
            HfcompressError: if it was changed or removed.
        """
        try:
            now = self.path.stat()
        except OSError:
            now = None
        if now is None or (now.st_size, now.st_mtime_ns) != (self.size, self.changed):
            what = "changed" if now else "vanished"
            raise HfcompressError(
                f"{self.path} {what} while it was sent, so nothing was committed",
                "let the run end that writes there, then push again",
            )


@contextmanager
def open_model(run: Path, stage: int | None = None, repo: str | None = None) -> Iterator[Path]:
    """Yields the directory to push: the run's, or one with the model of a stage and a card of its own.

    The second exists only inside the `with` block. Its large files are links.

    Args:
        run: The run directory.
        stage: The number of the stage, from 1; None for the final model.
        repo: The repository, for the code in the card.

    Raises:
        HfcompressError: if there is no such stage, or its model was not measured or is no longer the same.
    """
    if stage is None:
        yield run
        return
    loaded, content = open_finished(run)
    model = _open_stage(loaded, run, content, stage)
    hub = loaded.recipe.hub.model_copy(update={"repo": repo})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"hub": hub}))
    with TemporaryDirectory(prefix="hfcompress-") as folder:
        write_model(loaded, run, model, content, Path(folder), _link_large)
        yield Path(folder)


def _open_stage(loaded: Loaded, run: Path, content: dict[str, Any], number: int) -> Artifact:
    names, stages = loaded.recipe.stage_names(), loaded.recipe.stages
    if not 1 <= number <= len(names):
        raise HfcompressError(f"--stage {number}: the recipe has no such stage", f"it has: {', '.join(names)}")
    name = names[number - 1]
    tuned = [name for name, stage in zip(names, stages, strict=True) if not stage.compresses]
    row = "source" if tuned[-1:] == [name] else name  # what finetune makes is the source of the rest
    found = open_measured(loaded, run, content, row)
    if not found:
        raise HfcompressError(f"{name} was not measured, so there is no card for its model", "choose another stage")
    return found[0]


def _link_large(source: str, target: str) -> None:
    if Path(source).stat().st_size > SMALL:
        with suppress(OSError):  # some systems allow no links
            Path(target).symlink_to(Path(source).resolve())
            return
    shutil.copy2(source, target)


def list_uploads(run: Path) -> list[Upload]:
    """Lists the files of a run to push: the model, its tokenizer, the card, the recipe and the figures; no checkpoints.

    Raises:
        HfcompressError: if the run has no final model or no card, or the card names no licence.
    """
    final = run / "final" if (run / "final").is_dir() else run
    if not (final / "README.md").is_file() or not (final / "config.json").is_file():
        raise HfcompressError(f"{run} holds no finished model with a card", "finish it with `hfcompress run`")
    require_license_named(final)
    folders = (final, *(final / name for name in (ADAPTER, *FOLDERS)))
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    graphs = openvino_files(path.name for path in files)
    return [_upload(p, final) for p in files if _is_published(p.name, graphs)]


def require_license_named(model: Path) -> None:
    """Refuses a model whose card names no licence.

    Raises:
        HfcompressError: if it names none, or its metadata cannot be read.
    """
    import yaml
    from huggingface_hub import metadata_load

    card = model / "README.md"
    try:
        named = (metadata_load(card) or {}).get("license")
    except (ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())[:SHOWN]
        raise HfcompressError(f"the metadata of {card} cannot be read: {told}", "correct it, then push again") from None
    if not named:
        raise HfcompressError(
            f"{card} names no licence, so nobody would know who may use the model",
            f"{FIX}; the same `hfcompress run` then writes the card again",
        )


def _is_published(name: str, graphs: Collection[str]) -> bool:
    """True if a file of `final/` belongs to the model or to its card."""
    known = Path(name).suffix in SUFFIXES or name in graphs or EXTERNAL.search(name) is not None
    return known and name not in LEFT_OUT and not name.startswith(".")


def _upload(path: Path, final: Path) -> Upload:
    found = path.stat()
    return Upload(path.relative_to(final).as_posix(), path, found.st_size, found.st_mtime_ns)


def _make_operations(files: list[Upload], repo: str) -> list[Any]:
    """Makes the Hub's operations of the files; writes the repository's name into the code in the card."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for file in files:
        try:
            content: Path | bytes = file.path.read_bytes() if file.size <= SMALL else file.path
            if file.name == "README.md":
                text = file.path.read_text(encoding="utf-8").replace(UNNAMED, repo)
                content = PATH_IN_CODE.sub(rf'\g<1>path = "{repo}"', text).encode()
            operations.append(CommitOperationAdd(file.name, content))
        except (OSError, ValueError):
            file.require_unchanged()
            raise
    return operations


def choose_repository(run: Path, repo: str | None, private: bool = False) -> tuple[str, bool]:
    """Chooses the repository of a run, from the command or the recipe's `hub:`.

    Returns:
        The repository, and True if it is private.

    Raises:
        HfcompressError: if neither names a repository, or the name is not valid.
    """
    lock = run / "recipe.lock.json"
    hub = json.loads(lock.read_text(encoding="utf-8"))["recipe"].get("hub", {}) if lock.is_file() else {}
    name = repo or hub.get("repo")
    if not name:
        raise HfcompressError("no repository is named", "give --repo user/name, or set `hub.repo` in the recipe")
    try:
        require_hub_id(name)
    except ValueError as error:
        raise HfcompressError(f"{error}", "write --repo user/name") from error
    if "/" not in name:
        raise HfcompressError(f"'{name}' does not say whose repository it is", f"write --repo user/{name}")
    return name, private or bool(hub.get("private"))


def push(
    run: Path,
    repo: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
    stage: int | None = None,
) -> str:
    """Creates the repository if it does not exist, and commits all files at once.

    Args:
        run: The run directory.
        repo: `user/name`; default: the recipe's `hub.repo`.
        private: Create the repository as a private one; the recipe's `hub.private` does the same.
        endpoint: Another Hub than `HF_ENDPOINT` or huggingface.co.
        stage: The number of the stage whose model is pushed, from 1; default: the final model.

    Returns:
        The commit's address.

    Raises:
        HfcompressError: if the Hub refuses, or cannot be reached, or a file changes meanwhile.
    """
    repo, private = choose_repository(run, repo, private)
    with open_model(run, stage, repo) as folder:
        return commit(list_uploads(folder), run.resolve().name, repo, private, endpoint)


def commit(files: list[Upload], name: str, repo: str, private: bool, endpoint: str | None = None) -> str:
    """Creates the repository if it does not exist, and commits the files at once; returns the commit's address.

    Args:
        files: The files.
        name: The run's name, for the message of the commit.
        repo: `user/name`.
        private: Create the repository as a private one.
        endpoint: Another Hub than `HF_ENDPOINT` or huggingface.co.

    Raises:
        HfcompressError: if the Hub refuses, or cannot be reached, or a file changes meanwhile.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(endpoint=endpoint), f"{name}, made with hfcompress"
    operations = _make_operations(files, repo)
    try:
        with hub_calls(f"the push to {repo}"), _explain_card_errors():
            _require_repository(api, repo, private)
            # The large files are sent first, and the commit follows only if no file has changed until then.
            # `upload_folder` of huggingface_hub 2 has no moment for this check. It makes several commits if an upload
            # takes long, or if a commit of more than 20 files fails: then the Hub may show a card without its model.
            # And it sends the card as it is: for one changed line the folder would have to be copied.
            api.preupload_lfs_files(repo, operations, repo_type="model")
            for file in files:
                file.require_unchanged()
            made: Any = api.create_commit(repo, operations, commit_message=message, repo_type="model")
    except (OSError, HfcompressError):
        for file in files:
            file.require_unchanged()
        raise
    return str(made.commit_url)


@contextmanager
def _explain_card_errors() -> Iterator[None]:
    """Turns the Hub's error about a card into one that says how to fix it."""
    try:
        yield
    except ValueError as error:
        if "README.md" not in str(error):
            raise
        told = without_tokens(" ".join(str(error).split())[:SHOWN])
        raise HfcompressError(f"the Hub refuses the card: {told}", "fix `hub:` in the recipe") from None


def _require_repository(api: Any, repo: str, private: bool) -> None:
    """Creates the repository if it does not exist."""
    try:
        # None keeps the setting of an existing repository, and the default of an organisation.
        api.create_repo(repo, private=private or None, exist_ok=True, repo_type="model")
    except json.JSONDecodeError:  # some servers answer without a body if it exists
        if not api.repo_exists(repo, repo_type="model"):
            raise
