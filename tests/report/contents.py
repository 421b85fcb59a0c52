"""Reports that nobody measured, for the tests of report.html."""

from __future__ import annotations

from typing import Any

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def plain(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A report as an earlier version wrote it."""
    return {
        "schema": 1,
        "name": "tiny",
        "environment": {"cpu": "A processor", "cpu_flags": ["avx2"], "cores": 2, "accelerator": None},
        "task": {"split": "test", "max_length": 16},
        "rows": list(rows),
    } | more


CUTS = {
    "kept": {"heads": [[3, 4], [0, 4]], "ffn": [[48, 64], [1_024, 2_048]], "hidden": [32, 32],
             "layers": {"kept": [1, 3], "of": 3}},
    "sensitivity": {"metric": "accuracy", "split": "dev", "rows": 1234, "whole": 0.95, "shares": [0.5, 1.0],
                    "heads": [[0.9, 0.8], [0.95, 0.95]], "ffn": [[0.7, 0.45], [0.9, 0.9]]},
}  # fmt: skip
"""What a prune stage found out."""
