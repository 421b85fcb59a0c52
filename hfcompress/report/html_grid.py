"""The latency of report.html: by batch size, and by batch size and length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfcompress.report.conditions import was_busy
from hfcompress.report.names import list_names
from hfcompress.report.plain_runtime import describe_plain_speedup, list_plain_runtimes
from hfcompress.utils.wording import count, format_ratio


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
