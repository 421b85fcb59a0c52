"""The latency of report.html: by batch size, and by batch size and length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.report.conditions import was_busy
from hfcompress.report.cost_tables import list_cost_tables, list_timed
from hfcompress.report.names import list_names
from hfcompress.report.plain_runtime import describe_plain_speedup, list_plain_runtimes
from hfcompress.utils.wording import count, format_ratio, significant


def make_latency_grid(content: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the grid of models and batch sizes: median, 95th percentile, throughput, and the speed-up if known.

    The source in other runtimes has rows of its own below the source.
    """
    rows, busy = content["rows"], was_busy(content)
    names = list_names(content)
    timed = [(name, row["latency"], number > 0) for number, (name, row) in enumerate(zip(names, rows, strict=True))]
    timed[1:1] = [(plain["name"], plain["latency"], True) for plain in list_plain_runtimes(content)]
    columns = zip(*(latency for _, latency, _ in timed), strict=True)
    longest = [0 if busy else max(entry["p50_ms"] for entry in column) for column in columns]
    cells = [
        [_make_latency_cell(e, most, compared and not busy) for e, most in zip(latency, longest, strict=True)]
        for _, latency, compared in timed
    ]
    return {
        "headings": [f"batch {e['batch_size']} of {e['sequence_length']} tokens" for e in rows[0]["latency"]],
        "rows": [{"name": name, "cells": row} for (name, _, _), row in zip(timed, cells, strict=True)],
    }


def _make_latency_cell(entry: Mapping[str, Any], longest: float, is_compared: bool) -> dict[str, Any]:
    threads = f", {count(entry['threads'], 'thread')}" if entry.get("threads") else ""
    p99 = f", p99 {entry['p99_ms']:.2f} ms" if "p99_ms" in entry else ""
    speedup = f"{format_ratio(entry['speedup'])}x" if is_compared and entry["speedup"] else ""
    ends = [format_ratio(end) for end in entry.get("speedup_interval") or ()]
    return {
        "p50": f"{entry['p50_ms']:.2f}",
        "tails": f"p95 {entry['p95_ms']:.2f} ms{p99}",
        "rest": f"{entry['samples_per_s']:,.0f} rows/s; {entry['runtime']} {entry['dtype']}{threads}",
        "speedup": f"{speedup} ({ends[0]} to {ends[1]})" if speedup and len(set(ends)) > 1 else speedup,
        "plain": describe_plain_speedup(entry) if is_compared else "",
        "unsteady": bool(speedup) and not entry.get("narrow", True),
        "share": round(100 * entry["p50_ms"] / longest, 1) if longest else 0,
    }


STRONGEST = 8.0
"""The speed-up, or slow-down, with the strongest colour."""


def make_heat_maps(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Makes a table for each model with a row for each batch size and a column for each length.

    The strength of a cell's colour follows the logarithm of the speed-up. The figure stands in the cell, and a sign
    beside it tells slower from faster, so the colour tells nothing alone. The source and a busy machine have no colour.
    """
    busy = was_busy(content)
    return [
        _make_heat_map(name, cells, bool(number) and not busy)
        for number, (name, cells) in enumerate(list_timed(content))
    ]


def _make_heat_map(name: str, cells: Sequence[Mapping[str, Any]], compared: bool) -> dict[str, Any]:
    lengths = sorted({cell["sequence_length"] for cell in cells})
    found = {(cell["batch_size"], cell["sequence_length"]): cell for cell in cells}
    return {
        "name": name,
        "lengths": lengths,
        "rows": [
            {
                "batch": batch,
                "cells": [
                    _make_heat_cell(found[batch, length], compared) if (batch, length) in found else None
                    for length in lengths
                ],
            }
            for batch in sorted({cell["batch_size"] for cell in cells})
        ],
    }


def _make_heat_cell(entry: Mapping[str, Any], compared: bool) -> dict[str, Any]:
    speedup = entry["speedup"] if compared else None
    ends = [format_ratio(end) for end in entry.get("speedup_interval") or ()]
    strength = min(abs(math.log(speedup)) / math.log(STRONGEST), 1.0) if speedup else 0.0
    return {
        "p50": f"{entry['p50_ms']:.2f} ms",
        "speedup": f"{format_ratio(speedup)}x" if speedup else "",
        "interval": f"{ends[0]} to {ends[1]}" if speedup and len(set(ends)) > 1 else "",
        "plain": describe_plain_speedup(entry) if speedup else "",
        "tails": f"p95 {significant(entry['p95_ms'])}, p99 {significant(entry['p99_ms'])} ms",
        "rate": f"{entry['samples_per_s']:,.0f} rows/s",
        "kind": {True: "faster", False: "slower"}[speedup > 1] if speedup and speedup != 1 else "",
        "strength": round(85 * strength),
        "unsteady": bool(speedup) and not entry.get("narrow", True),
    }


def make_throughput(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Makes the table of sustained throughput; None if it was not measured."""
    found = next((table for table in list_cost_tables(content) if table.title.startswith("Sustained")), None)
    return None if found is None else vars(found)
