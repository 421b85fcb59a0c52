"""Publishes a run's final model and its card, in one commit."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.data.hub import SHOWN, hub_calls
from hfcompress.models.weights import ADAPTER, openvino_files
from hfcompress.report.snippet import UNNAMED
from hfcompress.utils.card_metadata import require_hub_id
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import without_tokens

SUFFIXES = frozenset({".json", ".safetensors", ".onnx", ".txt", ".model", ".codes", ".spm", ".tiktoken", ".md", ".png",
                      ".py", ".yaml", ".jinja"})  # fmt: skip
EXTERNAL = re.compile(r"\.onnx(_data|\.data)(_\d+)?$")
"""Weights that lie beside a graph that is too large to hold them."""
LEFT_OUT = frozenset({"stage.json", "training_args.bin"})
SMALL = 10_000_000
"""Bytes up to which a file is read before anything is sent: what is sent is then what was listed."""


@dataclass(frozen=True)
class Upload:
    """A file that is pushed: its name in the repository, where it lies, its bytes, when it was changed last."""

    name: str
    path: Path
    size: int
    changed: int

    def require_unchanged(self) -> None:
        """Passes where the file is still the one that was listed.

        Raises:
            HfcompressError: where it was written to, or is gone.
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
    return [_upload(p, final) for p in files if _belongs(p.name, graphs)]


def _belongs(name: str, graphs: Collection[str]) -> bool:
    """Whether a file of `final/` is a part of the model, or of what is told of it."""
    known = Path(name).suffix in SUFFIXES or name in graphs or EXTERNAL.search(name) is not None
    return known and name not in LEFT_OUT and not name.startswith(".")


def _upload(path: Path, final: Path) -> Upload:
    found = path.stat()
    return Upload(path.relative_to(final).as_posix(), path, found.st_size, found.st_mtime_ns)


def _operations(files: list[Upload], repo: str) -> list[Any]:
    """The files as they are sent; the card's snippet names the repository that it now stands in."""
    from huggingface_hub import CommitOperationAdd

    operations = []
    for file in files:
        try:
            content: Path | bytes = file.path.read_bytes() if file.size <= SMALL else file.path
            if file.name == "README.md":
                content = file.path.read_text(encoding="utf-8").replace(UNNAMED, repo).encode()
            operations.append(CommitOperationAdd(file.name, content))
        except (OSError, ValueError):
            file.require_unchanged()
            raise
    return operations


def target(run: Path, repo: str | None, private: bool = False) -> tuple[str, bool]:
    """Where a run goes: the repository and whether it is private, of the command or of the recipe's `hub:`.

    Raises:
        HfcompressError: where neither names a repository, or the name is none.
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
    from huggingface_hub import HfApi

    files, (repo, private) = uploads(run), target(run, repo, private)
    api, message = HfApi(endpoint=endpoint), f"{run.resolve().name}, made with hfcompress"
    operations = _operations(files, repo)
    try:
        with hub_calls(f"the push to {repo}"), _card_errors():
            _require_repository(api, repo, private)
            # The large files first: a commit of the rest follows only where none was written to meanwhile.
            api.preupload_lfs_files(repo, operations, repo_type="model")
            for file in files:
                file.require_unchanged()
            commit: Any = api.create_commit(repo, operations, commit_message=message, repo_type="model")
    except (OSError, HfcompressError):
        for file in files:
            file.require_unchanged()
        raise
    return str(commit.commit_url)


@contextmanager
def _card_errors() -> Iterator[None]:
    """What the Hub says of a card that it does not take."""
    try:
        yield
    except ValueError as error:
        if "README.md" not in str(error):
            raise
        told = without_tokens(" ".join(str(error).split())[:SHOWN])
        raise HfcompressError(f"the Hub refuses the card: {told}", "fix `hub:` in the recipe") from None


def _require_repository(api: Any, repo: str, private: bool) -> None:
    """Creates the repository where it does not exist."""
    try:
        # None leaves a repository that exists, and an organisation's default, as they are.
        api.create_repo(repo, private=private or None, exist_ok=True, repo_type="model")
    except json.JSONDecodeError:  # some servers say that it exists without any words
        if not api.repo_exists(repo, repo_type="model"):
            raise
