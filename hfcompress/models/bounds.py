"""The largest sizes that a config.json or a recipe may claim, checked before anything of that size is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hfcompress.utils.errors import HfcompressError

LARGEST = {
    "layers": 4_096,  # DeepNet (arXiv:2203.00555) has 1,000, published models at most about 130
    "heads": 4_096,  # published models have at most about 200
    "width": 1 << 20,  # hidden, FFN, heads and embeddings; the widest published FFN is below 100,000
    "vocabulary": 1 << 24,  # published ones are below 1,100,000
    "positions": 1 << 30,  # Llama 4 reads 10,485,760
    "types": 1 << 16,
    "labels": 1 << 17,
    "relative": 1 << 16,
    "rounds": 1_000,  # of a schedule: each of them trains
}
"""The largest allowed size of each kind: far above any published model, and small enough for quick arithmetic."""
_COUNTS = ((re.compile(r"(^|_)(num|n|encoder|decoder)_.*layers?$|^n_?layers?$|_layers$"), "layers"),
           (re.compile(r"(^|_)(num|n|encoder|decoder)_.*heads?$|^n_?heads?$|_heads$"), "heads"))  # fmt: skip


def is_count(value: Any, low: int = 0) -> bool:
    """True for a whole number of at least `low` in a JSON file; `true` and `12.0` are not whole numbers."""
    return type(value) is int and value >= low


def require_bound(name: str, value: int, kind: str) -> None:
    """Checks that a size is at most the largest one of its kind.

    Args:
        name: The name of the size, such as `num_hidden_layers`.
        value: The size.
        kind: A key of `LARGEST`.

    Raises:
        HfcompressError: for a larger one.
    """
    if value > LARGEST[kind]:
        raise HfcompressError(
            f"the config says {name}: {shorten(value)}, and at most {LARGEST[kind]:,} are allowed",
            "no published model comes near it: use the config.json that belongs to the weights",
        )


def require_bounds(config: Mapping[str, Any]) -> None:
    """Checks the numbers of layers and heads in the config of any architecture.

    Raises:
        HfcompressError: for a number that is negative, not whole, or too large.
    """
    for key, value in config.items():
        kind = next((kind for pattern, kind in _COUNTS if pattern.search(str(key))), None)
        if kind and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not is_count(value):
                raise HfcompressError(
                    f"the config says {key}: {shorten(value)}", "it takes a whole number of at least 0"
                )
            require_bound(key, int(value), kind)
        if isinstance(value, Mapping) and key.endswith("_config"):
            require_bounds(value)


def shorten(value: Any) -> str:
    """Shortens a value of a foreign file for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
