"""The source in plain runtimes, unchanged: how much of a speed-up is compression, and how much is the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ONNX = "source in ONNX Runtime"
"""The only plain runtime of reports of earlier versions, which do not name it."""


def list_plain_runtimes(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists the source in other runtimes: `name`, `runtime`, `dtype` and `latency` of each.

    Reports of earlier versions hold one of them, as a mapping without a name.
    """
    found = content.get("plain_runtime") or []
    return [
        {"name": ONNX, **plain, "latency": [{**entry, "speedup_plain": None} for entry in plain["latency"]]}
        for plain in ([found] if isinstance(found, Mapping) else found)
    ]


def describe_plain_speedup(entry: Mapping[str, Any]) -> str:
    """Describes the speed-up of a graph over the source in its fastest plain runtime; empty for any other model."""
    factor = entry.get("speedup_plain") if entry["runtime"] != "torch" else None
    return f"{factor:.1f}x against the {entry.get('plain', ONNX)}" if factor else ""
