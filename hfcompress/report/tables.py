"""The rows of a report as a table: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import render_conditions, was_busy
from hfcompress.utils.escape import markdown
from hfcompress.utils.wording import significant

if TYPE_CHECKING:
    from rich.table import Table

_TIMED = ("p50_ms", "p95_ms", "samples_per_s", "speedup", "speedup_low", "speedup_high", "rounds", "threads")
"""Columns of the CSV for each batch size."""


def find_metric(content: Mapping[str, Any]) -> str:
    """Finds the name of the metric that the rows are compared by."""
    return next(name for name in content["rows"][0]["quality"] if name != "n")


def list_headings(content: Mapping[str, Any]) -> list[str]:
    """Lists the headings of the table's columns."""
    sizes = [entry["batch_size"] for entry in content["rows"][0]["latency"]]
    embeddings = ["embeddings MB"] if _has_embedding_sizes(content) else []
    energy = ["Wh / 1k"] if _has_energy(content) else []
    return [
        "model",
        find_metric(content),
        "95% interval",
        "of source",
        "parameters",
        "encoder",
        "MB",
        *embeddings,
        "smaller",
        *[text for size in sizes for text in (f"ms, batch {size}", "faster")],
        "peak MB",
        *energy,
    ]


def format_cells(content: Mapping[str, Any]) -> list[list[str]]:
    """Formats the figures of each row, in the order of `list_headings`."""
    return [_format_row(content, row) for row in content["rows"]]


def _format_row(content: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    metric = find_metric(content)
    base = content["rows"][0]["quality"][metric]
    low, high = row["quality_interval"]
    timed = [
        text
        for entry in row["latency"]
        for text in (f"{entry['p50_ms']:.2f}", "busy" if was_busy(content) else _format_speedup(entry))
    ]
    return [
        row["stage"],
        f"{row['quality'][metric]:.4f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['quality'][metric] / base:.1%}" if base else "-",
        _format_count(row["parameters"]),
        _format_count(row["encoder_parameters"]),
        significant(row["disk_bytes"] / 1e6),
        *([_format_megabytes(row.get("embedding_bytes"))] if _has_embedding_sizes(content) else []),
        f"{row['compression']:.2f}x",
        *timed,
        f"{row['peak_memory_bytes'] / 1e6:.0f}",
        *([_format_energy(row["energy_wh_per_1k"])] if _has_energy(content) else []),
    ]


def _has_embedding_sizes(content: Mapping[str, Any]) -> bool:
    """True if the size of some model's embeddings is known; reports of earlier versions do not have it."""
    return any(row.get("embedding_bytes") is not None for row in content["rows"])


def _has_energy(content: Mapping[str, Any]) -> bool:
    return any(row["energy_wh_per_1k"] is not None for row in content["rows"])


def _format_speedup(entry: Mapping[str, Any]) -> str:
    """Formats a speed-up with its interval, `3.90x (3.82-3.98)`; an interval that rounds to one number is left out."""
    if entry["speedup"] is None:
        return "-"
    ends = [format_ratio(value) for value in entry.get("speedup_interval") or ()]
    return f"{entry['speedup']:.2f}x" + (f" ({'-'.join(ends)})" if len(set(ends)) > 1 else "")


def format_ratio(value: float) -> str:
    """Formats a ratio with about three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _format_megabytes(count: int | None) -> str:
    return "-" if count is None else significant(count / 1e6)


def _format_energy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _format_count(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"


def render_markdown(content: Mapping[str, Any]) -> str:
    """Renders the table and the conditions of the measurement as Markdown."""
    head = list_headings(content)
    lines = ["| " + " | ".join(map(markdown, head)) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in format_cells(content)]
    return "\n".join(lines) + f"\n\n{render_conditions(content)}\n"


def render_csv(content: Mapping[str, Any]) -> str:
    """Renders every figure as CSV, with a line for each model and a column for each figure."""
    metric = find_metric(content)
    lines = []
    for row in content["rows"]:
        flat = {k: v for k, v in row.items() if k not in ("quality", "quality_interval", "latency")}
        flat |= {metric: row["quality"][metric], "n": row["quality"]["n"]}
        flat |= {f"{metric}_low": row["quality_interval"][0], f"{metric}_high": row["quality_interval"][1]}
        for entry in row["latency"]:
            low, high = entry.get("speedup_interval") or (None, None)
            figures = {**entry, "speedup_low": low, "speedup_high": high}
            flat |= {f"batch_{entry['batch_size']}_{key}": figures.get(key) for key in _TIMED}
        if was_busy(content):
            flat |= {key: "busy" for key in flat if "speedup" in key}
        lines.append(flat)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def render_table(content: Mapping[str, Any]) -> Table:
    """Renders the table for the terminal."""
    from rich import box
    from rich.table import Table

    title = content["name"] + (" (timed on a busy machine)" if was_busy(content) else "")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for index, heading in enumerate(list_headings(content)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in format_cells(content):
        table.add_row(*row)
    return table
