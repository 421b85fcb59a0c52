"""Recognizes directories of sentence-transformers and `transformers.exporters`, to say how their models can be used."""

from __future__ import annotations

import json
from pathlib import Path

MODULES = "modules.json"
"""The file by which sentence-transformers lists the parts of a model and their folders."""
EXPORT = "export.json"
"""The file by which `transformers.exporters` describes a graph; it writes no tokenizer beside it."""


def find_backbone(path: Path) -> Path | None:
    """Finds the folder with the transformer of a sentence-transformers directory; None in any other directory."""
    try:
        first = json.loads((path / MODULES).read_text(encoding="utf-8"))[0]
        folder = path / str(first["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return folder if (folder / "config.json").is_file() else None


def gives_embeddings(path: Path) -> bool:
    """True if a directory is a sentence-transformers model, or the transformer in it."""
    return any(find_backbone(folder) == path for folder in (path, path.parent))


def explain_missing_tokenizer(path: Path) -> str:
    """Says where to get the tokenizer of a model directory without one."""
    if (path / EXPORT).is_file():
        return (
            "transformers.exporters writes none: save that of the exported model beside the graph, by "
            f'AutoTokenizer.from_pretrained(SOURCE).save_pretrained("{path}")'
        )
    return "put the tokenizer's files, as save_pretrained writes them, beside the model"
