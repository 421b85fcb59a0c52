"""Publishes a run's final model and its card, in one commit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.base.errors import HfcompressError
from hfcompress.card import UNNAMED
from hfcompress.data.source import hub_errors
from hfcompress.model.artifact import ADAPTER, openvino_files

SUFFIXES = frozenset({".json", ".safetensors", ".onnx", ".txt", ".model", ".md", ".png", ".py", ".yaml", ".jinja"})
LEFT_OUT = frozenset({"stage.json", "training_args.bin"})


@dataclass(frozen=True)
class Upload:
    """A file that is pushed: its name in the repository, where it lies, its bytes."""

    name: str
    path: Path
    size: int


def uploads(run: Path) -> list[Upload]:
    """What `push` sends of a run: the model, its tokenizer, the card, the recipe and the pictures; no checkpoints.

    Raises:
        HfcompressError: where the run has no final model or no card.
    """
    final = run / "final" if (run / "final").is_dir() else run
    if not (final / "README.md").is_file() or not (final / "config.json").is_file():
        raise HfcompressError(f"{run} holds no finished model with a card", "finish it with `hfcompress run`")
    files = (p for p in (*sorted(final.iterdir()), *sorted((final / ADAPTER).glob("*"))) if p.is_file())
    graphs = openvino_files(p.name for p in final.iterdir())
    return [
        Upload(p.relative_to(final).as_posix(), p, p.stat().st_size)
        for p in files
        if (p.suffix in SUFFIXES or p.name in graphs) and p.name not in LEFT_OUT and not p.name.startswith(".")
    ]


def _content(file: Upload, repo: str) -> Path | bytes:
    """A file as it is sent: the card's snippet names the repository that it now stands in."""
    if file.name != "README.md":
        return file.path
    return file.path.read_text(encoding="utf-8").replace(UNNAMED, repo).encode()


def target(run: Path, repo: str | None, private: bool = False) -> tuple[str, bool]:
    """Where a run goes: the repository and whether it is private, of the command or of the recipe's `hub:`.

    Raises:
        HfcompressError: where neither names a repository, or the name is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    lock = run / "recipe.lock.json"
    hub = json.loads(lock.read_text(encoding="utf-8"))["recipe"].get("hub", {}) if lock.is_file() else {}
    name = repo or hub.get("repo")
    if not name:
        raise HfcompressError("no repository is named", "give --repo user/name, or set `hub.repo` in the recipe")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HfcompressError(f"'{name}' is no repository name: {error}", "write --repo user/name") from error
    if "/" not in name:
        raise HfcompressError(f"'{name}' does not say whose repository it is", f"write --repo user/{name}")
    return name, private or bool(hub.get("private"))


def push(run: Path, repo: str | None = None, private: bool = False, endpoint: str | None = None) -> str:
    """Creates the repository where it does not exist and commits all files at once.

    Args:
        run: The run directory.
        repo: `user/name`; default: the recipe's `hub.repo`.
        private: For a repository that is created now; the recipe's `hub.private` asks for the same.
        endpoint: Another Hub than `HF_ENDPOINT` or huggingface.co.

    Returns:
        The commit's address.

    Raises:
        HfcompressError: where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files, (repo, private) = uploads(run), target(run, repo, private)
    api = HfApi(endpoint=endpoint)
    operations = [CommitOperationAdd(file.name, _content(file, repo)) for file in files]
    with hub_errors(f"the push to {repo}"):
        try:
            # None leaves a repository that exists, and an organisation's default, as they are.
            api.create_repo(repo, private=private or None, exist_ok=True, repo_type="model")
            commit: Any = api.create_commit(
                repo, operations, commit_message=f"{run.resolve().name}, made with hfcompress", repo_type="model"
            )
        except ValueError as error:
            if "README.md" not in str(error):
                raise
            raise HfcompressError(f"the Hub refuses the card: {error}", "mend `hub:` in the recipe") from error
    return str(commit.commit_url)
