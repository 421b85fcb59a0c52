"""Saves a tokenizer so that it also loads in older transformers, which Optimum and sentence-transformers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERIC, KNOWN = "TokenizersBackend", "PreTrainedTokenizerFast"
"""The class of a tokenizer that has none of its own: its name in transformers 5, and the one that 4 knows too."""
OF_THIS_LOADING = ("is_local", "local_files_only")
"""Settings that tell how the tokenizer was loaded here."""


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes a tokenizer's files into a directory.

    The generic class gives token types in transformers 4 and none in 5. The file therefore names the inputs too, so
    that both read pairs of texts alike.
    """
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content = {key: value for key, value in saved.items() if key not in OF_THIS_LOADING}
    if content.get("tokenizer_class") == GENERIC:
        content |= {"tokenizer_class": KNOWN, "model_input_names": list(tokenizer.model_input_names)}
    if content != saved:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")
