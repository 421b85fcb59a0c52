"""The tables of what a model costs beside the main one: latency by batch and length, and sustained throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import was_busy
from hfcompress.report.names import list_names
from hfcompress.report.plain_runtime import list_plain_runtimes
from hfcompress.utils.escape import markdown
from hfcompress.utils.wording import format_ratio

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CostTable:
    """A table: its title, its headings, and the cells of its rows; the first column names the model."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def list_timed(content: Mapping[str, Any], key: str = "latency_grid") -> list[tuple[str, list[dict[str, Any]]]]:
    """Lists the names of the source, the source in plain runtimes, and the other models, with the times of each.

    Args:
        content: The report.
        key: `latency` for the times at each batch size, `latency_grid` for those at each batch size and length. A model
            without them is left out.
    """
    (source, *others), plain = (
        list(zip(list_names(content), content["rows"], strict=True)),
        list_plain_runtimes(content),
    )
    every = [source, *((each["name"], each) for each in plain), *others]
    return [(name, row[key]) for name, row in every if row.get(key)]


def list_cost_tables(content: Mapping[str, Any]) -> list[CostTable]:
    """Lists the tables that a report has figures for."""
    found = []
    if cells := list(_list_cells(content)):
        head = ["model", "batch", "length", "p50 ms", "p95 ms", "p99 ms", "rows/s", "faster (95%)"]
        found.append(CostTable("Latency by batch and length (rows of exactly this length, in tokens)", head, cells))
    rows = [
        (name, row["sustained"])
        for name, row in zip(list_names(content), content["rows"], strict=True)
        if row.get("sustained")
    ]
    if rows:
        threads = sorted({entry["threads"] for _, entries in rows for entry in entries})
        title = f"Sustained throughput at batch {rows[0][1][0]['batch_size']}, rows/s by threads"
        found.append(CostTable(title, ["model", *map(str, threads)], [_list_speeds(*row, threads) for row in rows]))
    return found


def _list_cells(content: Mapping[str, Any]) -> Iterator[list[str]]:
    busy = was_busy(content)
    for number, (name, entries) in enumerate(list_timed(content)):
        for e in entries:
            times = (f"{e[key]:.2f}" for key in ("p50_ms", "p95_ms", "p99_ms"))
            speedup = "busy" if busy else format_speedup(e) if number else "-"
            yield [name, str(e["batch_size"]), str(e["sequence_length"]), *times, f"{e['samples_per_s']:,.0f}", speedup]


def format_speedup(entry: Mapping[str, Any]) -> str:
    """Formats a speed-up with its interval, `3.90x (3.82-3.98)`; an interval that rounds to one number is left out."""
    if entry["speedup"] is None:
        return "-"
    ends = [format_ratio(value) for value in entry.get("speedup_interval") or ()]
    return f"{entry['speedup']:.2f}x" + (f" ({'-'.join(ends)})" if len(set(ends)) > 1 else "")


def _list_speeds(name: str, entries: Sequence[Mapping[str, Any]], threads: Sequence[int]) -> list[str]:
    speeds = {entry["threads"]: f"{entry['samples_per_s']:,.0f}" for entry in entries}
    return [name, *(speeds.get(number, "-") for number in threads)]


def render_cost_markdown(content: Mapping[str, Any]) -> str:
    """Renders the tables as Markdown, each below its title; empty if there are none."""
    parts = []
    for table in list_cost_tables(content):
        first, *others = ("| " + " | ".join(map(markdown, cells)) + " |" for cells in (table.headings, *table.rows))
        align = "|---|" + "--:|" * (len(table.headings) - 1)
        parts.append("\n".join([f"{markdown(table.title)}:", "", first, align, *others]) + "\n")
    return "\n".join(parts)


def render_cost_tables(content: Mapping[str, Any]) -> list[Table]:
    """Renders the tables for the terminal."""
    from rich import box
    from rich.table import Table

    found = []
    for each in list_cost_tables(content):
        table = Table(
            box=box.SIMPLE_HEAD, title=each.title, title_justify="left", pad_edge=False, collapse_padding=True,
            show_edge=False,
        )  # fmt: skip
        for number, heading in enumerate(each.headings):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        before = ""
        for name, *cells in each.rows:
            table.add_row("" if name == before else name, *cells)
            before = name
        found.append(table)
    return found
