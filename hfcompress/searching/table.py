"""The trials of a search as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.utils.wording import format_ratio

if TYPE_CHECKING:
    from rich.table import Table


def render_trials(content: Mapping[str, Any]) -> Table:
    """Renders search.json as a table: the candidates that were tried, fastest first."""
    from rich import box
    from rich.table import Table

    relative = str(content["target"]["max_drop"]).endswith("%")
    sizes = content["batch_sizes"]
    headings = ["", "candidate", "loss", "at most", *(f"batch {size}" for size in sizes), "MB", "s"]
    rows = []
    for number, trial in enumerate(content["trials"], start=1):
        mark = "*" if number == content["best"] else "(*)" if number == content["chosen"] else ""
        if trial["error"]:
            cells = ["failed", trial["error"][:40], *("" for _ in sizes), ""]
        else:
            speeds = {int(size): ends[0] for size, ends in (trial["speedups"] or {}).items()}
            cells = [
                _format_loss(trial["drop"], relative),
                _format_loss(trial["largest"], relative) + ("" if trial["holds"] else " !"),
                *(format_ratio(speeds[size]) + "x" if size in speeds else "-" for size in sizes),
                f"{trial['bytes'] / 1e6:.1f}",
            ]
        rows.append((trial["speedup"] or 0, [mark, trial["name"], *cells, f"{trial['seconds']:.0f}"]))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for heading in headings:
        left = heading in ("", "candidate")
        table.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for _, cells in sorted(rows, key=lambda row: -row[0]):
        table.add_row(*cells)
    return table


def _format_loss(value: float, relative: bool) -> str:
    value = value + 0.0 if abs(value) >= 5e-5 else 0.0  # no negative zero
    return f"{100 * value:.2f}%" if relative else f"{value:.4f}"
