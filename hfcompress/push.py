"""Publishes a run's final model and its card, in one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.base.errors import HfcompressError

SUFFIXES = frozenset({".json", ".safetensors", ".onnx", ".txt", ".model", ".md", ".png", ".py", ".yaml"})
LEFT_OUT = frozenset({"stage.json", "training_args.bin"})


@dataclass(frozen=True)
class Upload:
    """A file that is pushed: its name in the repository, where it lies, its bytes."""

    name: str
    path: Path
    size: int


def uploads(run: Path) -> list[Upload]:
    """What `push` sends of a run: the model, its tokenizer, the card, the recipe and the plot; no checkpoints.

    Raises:
        HfcompressError: where the run has no final model or no card.
    """
    final = run / "final" if (run / "final").is_dir() else run
    if not (final / "README.md").is_file() or not (final / "config.json").is_file():
        raise HfcompressError(f"{run} holds no finished model with a card", "finish it with `hfcompress run`")
    files = (p for p in sorted(final.iterdir()) if p.is_file())
    return [
        Upload(p.name, p, p.stat().st_size)
        for p in files
        if p.suffix in SUFFIXES and p.name not in LEFT_OUT and not p.name.startswith(".")
    ]


def push(run: Path, repo: str, private: bool = False, endpoint: str | None = None) -> str:
    """Creates the repository where it does not exist and commits all files at once.

    Args:
        run: The run directory.
        repo: `user/name`.
        private: For a repository that is created now.
        endpoint: Another Hub than `HF_ENDPOINT` or huggingface.co.

    Returns:
        The commit's address.

    Raises:
        HfcompressError: where the Hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    files = uploads(run)
    api = HfApi(endpoint=endpoint)
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path) for file in files]
    try:
        api.create_repo(repo, private=private, exist_ok=True, repo_type="model")
        commit: Any = api.create_commit(
            repo, operations, commit_message=f"{run.name}, made with hfcompress", repo_type="model"
        )
    except HFValidationError as error:
        raise HfcompressError(f"'{repo}' is no repository name: {error}", "write --repo user/name") from error
    except LocalTokenNotFoundError as error:
        raise HfcompressError("no Hub token is known", "run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        fix = "run `hf auth login` with a token that may write" if status in (401, 403) else "try again later"
        raise HfcompressError(f"the Hub refused the push to {repo} ({status})", fix) from error
    except OSError as error:
        raise HfcompressError(f"the Hub cannot be reached ({type(error).__name__})", "check the connection") from error
    return str(commit.commit_url)
