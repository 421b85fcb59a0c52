"""The rows of a report as a table: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.report.conditions import describe_batch_sensitivity, find_metric, render_conditions, was_busy
from hfcompress.report.cost_tables import format_speedup, render_cost_markdown
from hfcompress.report.costs import list_cost_columns
from hfcompress.report.names import list_names, list_renamed
from hfcompress.report.seeds import format_spread
from hfcompress.report.verdicts import describe_verdicts
from hfcompress.utils.escape import markdown
from hfcompress.utils.wording import significant

if TYPE_CHECKING:
    from rich.table import Table

_TIMED = ("p50_ms", "p95_ms", "p99_ms", "samples_per_s", "speedup", "speedup_low", "speedup_high", "speedup_plain",
          "rounds", "threads")  # fmt: skip
"""Columns of the CSV for each batch size."""
_COMPARED = {
    "change": "change", "low": "change_low", "high": "change_high", "reading": "reading", "p_value": "p_value",
    "margin": "margin", "verdict": "verdict", "largest_drop": "largest_drop", "units_needed": "units_needed",
    "broken": "broken", "repaired": "repaired", "agreement": "agreement", "divergence": "divergence",
}  # fmt: skip
"""Columns of the CSV about the comparison with the source, by key of the report."""
_ENERGY = {"source": "energy_source", "co2_g_per_1k": "co2_g_per_1k"}
"""Columns of the CSV about energy, beside the watt-hours, by key of the report."""
_NESTED = ("quality", "quality_interval", "latency", "latency_grid", "bytes_by_part", "cold_start", "sustained",
           "batch_sensitivity", "against_source", "confidence", "seeds", "energy")  # fmt: skip
_FLATTENED = {
    "bytes_by_part": ("encoder", "head", "other"), "cold_start": ("seconds", "import_seconds", "load_seconds"),
    "batch_sensitivity": ("rows", "answers_changed", "largest_difference"),
}  # fmt: skip
"""Figures of a row that are columns of the CSV, by the key that holds them."""
WIDTH, LEAST_NAME = 80, 12
"""Characters of the narrow table, and of a model's name at least."""
READINGS = {"within noise": "noise", "worse": "worse", "better": "better"}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: Its heading, which may need the column before it to be understood.
        format: Writes the cell of a row.
        alone: What it is called without the column before it, if that is not its heading.
    """

    heading: str
    format: Callable[[Mapping[str, Any]], str]
    alone: str = ""

    @property
    def name(self) -> str:
        """What the column is called where it stands alone."""
        return self.alone or self.heading


def list_columns(content: Mapping[str, Any], wide: bool = True) -> list[Column]:
    """Lists the columns of the table.

    Args:
        content: The report.
        wide: All columns; otherwise those that matter most, which fit into 80 characters.
    """
    metric, compared = find_metric(content), any("against_source" in row for row in content["rows"])
    margin = next(
        (r["against_source"]["margin"] for r in content["rows"] if "margin" in r.get("against_source", {})), ""
    )
    sizes = [entry["batch_size"] for entry in content["rows"][0]["latency"]]
    head = [
        Column("model", lambda row: str(row["stage"])),
        Column(metric, lambda row: f"{row['quality'][metric]:.4f}"),
    ]
    smaller = Column("smaller", lambda row: f"{row['compression']:.2f}x")
    verdict = Column(f"within {margin}", lambda row: row.get("against_source", {}).get("verdict", "-"))
    busy = was_busy(content)
    if not wide:
        change = Column("change", _format_change)
        faster = [Column(f"speed @{size}", partial(_format_plain_speedup, n, busy)) for n, size in enumerate(sizes)]
        return [*head, *([change, verdict] if compared else []), smaller, *faster]
    change = Column("change (95%)", _format_interval_of_change)
    timed = [
        column
        for number, size in enumerate(sizes)
        for column in (
            Column(f"ms, batch {size}", partial(_format_milliseconds, number)),
            Column("faster", partial(_format_speedup, number, busy), f"faster, batch {size}"),
        )
    ]
    parts = [
        Column("embeddings MB", lambda row: _format_megabytes(row.get("embedding_bytes"))),
        *(
            [
                Column("encoder MB", lambda row: _format_megabytes((row.get("bytes_by_part") or {}).get("encoder"))),
                Column("rest MB", lambda row: _format_megabytes(_count_rest(row.get("bytes_by_part")))),
            ]
            if _has(content, "bytes_by_part")
            else []
        ),
    ]
    start = [Column("cold start s (import)", lambda row: _format_cold_start(row.get("cold_start")))]
    gpu = [Column("peak GPU MB", lambda row: _format_megabytes(row.get("device_memory_bytes")))]
    return [
        *head,
        Column("95% interval", lambda row: "{:.3f}-{:.3f}".format(*row["quality_interval"])),
        Column("of source", partial(_format_share, content["rows"][0]["quality"][metric], metric)),
        *([change, verdict] if compared else []),
        *_list_seed_columns(content),
        Column("parameters", lambda row: _format_count(row["parameters"])),
        Column("encoder", lambda row: _format_count(row["encoder_parameters"])),
        Column("MB", lambda row: significant(row["disk_bytes"] / 1e6)),
        *(parts if _has(content, "embedding_bytes") else []),
        smaller,
        *timed,
        *(start if _has(content, "cold_start") else []),
        Column("peak MB", lambda row: f"{row['peak_memory_bytes'] / 1e6:.0f}"),
        *(gpu if _has(content, "device_memory_bytes") else []),
        *(Column(heading, format) for heading, format in list_cost_columns(content, busy)),
    ]


def split_columns(content: Mapping[str, Any], wide: bool = True) -> tuple[list[Column], list[Column]]:
    """Splits the columns of the table into those that differ between models, and those that are the same for all.

    Name and quality are always among the first.
    """
    shown: list[Column] = []
    constant: list[Column] = []
    for number, column in enumerate(list_columns(content, wide)):
        cells = {column.format(row) for row in content["rows"]}
        (constant if number > 1 and len(cells) == 1 < len(content["rows"]) else shown).append(column)
    return shown, constant


def list_headings(content: Mapping[str, Any], wide: bool = True) -> list[str]:
    """Lists the headings of `list_columns`."""
    return [column.heading for column in list_columns(content, wide)]


def format_cells(content: Mapping[str, Any], wide: bool = True) -> list[list[str]]:
    """Formats the figures of each row, in the order of `list_columns`."""
    columns = list_columns(content, wide)
    return [[column.format(row) for column in columns] for row in content["rows"]]


def _format_change(row: Mapping[str, Any]) -> str:
    """Formats the change against the source and how to read it, `-0.001 noise`."""
    found = row.get("against_source", {})
    return f"{found['change']:+.3f} {READINGS[found['reading']]}" if "change" in found else "-"


def _format_interval_of_change(row: Mapping[str, Any]) -> str:
    found = row.get("against_source", {})
    if "change" not in found:
        return "-"
    return f"{found['change']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f}), {found['reading']}"


def _format_share(base: float, metric: str, row: Mapping[str, Any]) -> str:
    return f"{row['quality'][metric] / base:.1%}" if base else "-"


def _format_milliseconds(number: int, row: Mapping[str, Any]) -> str:
    return f"{row['latency'][number]['p50_ms']:.2f}"


def _format_plain_speedup(number: int, busy: bool, row: Mapping[str, Any]) -> str:
    speedup = row["latency"][number]["speedup"]
    return "busy" if busy else "-" if speedup is None else f"{speedup:.2f}x"


def _list_seed_columns(content: Mapping[str, Any]) -> list[Column]:
    """Lists the column with mean and standard deviation over seeds, if the models were made with several."""
    count = max((len(row.get("seeds", {}).get("seeds", ())) for row in content["rows"]), default=0)
    if not count:
        return []
    return [Column(f"{count} seeds", lambda row: format_spread(row["seeds"]) if "seeds" in row else "-")]


def _has(content: Mapping[str, Any], key: str) -> bool:
    """True if some model has a figure; reports of earlier versions do not have all of them."""
    return any(row.get(key) is not None for row in content["rows"])


def _count_rest(parts: Mapping[str, int] | None) -> int | None:
    return None if parts is None else parts["head"] + parts["other"]


def _format_cold_start(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['seconds']:.2f} ({found['import_seconds']:.2f})"


def _format_speedup(number: int, busy: bool, row: Mapping[str, Any]) -> str:
    return "busy" if busy else format_speedup(row["latency"][number])


def _format_megabytes(count: int | None) -> str:
    return "-" if count is None else significant(count / 1e6)


def _format_count(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"


def render_markdown(content: Mapping[str, Any]) -> str:
    """Renders the table and the conditions of the measurement as Markdown."""
    head = list_headings(content)
    lines = ["| " + " | ".join(map(markdown, head)) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in format_cells(content)]
    verdicts = "".join(f"- {markdown(sentence)}\n" for sentence in describe_verdicts(content))
    told = [(row["stage"], describe_batch_sensitivity(row)) for row in content["rows"]]
    sensitive = "".join(f"- {markdown(f'{stage}: {sentence}')}\n" for stage, sentence in told if sentence)
    conditions = f"{render_conditions(content)}\n"
    parts = ["\n".join(lines) + "\n", verdicts + sensitive, conditions, render_cost_markdown(content)]
    return "\n".join(part for part in parts if part)


def render_csv(content: Mapping[str, Any]) -> str:
    """Renders every figure as CSV, with a line for each model and a column for each figure."""
    metric, timed = find_metric(content), (*_TIMED, *(["cost_per_million"] if "price" in content else []))
    lines = []
    for row in content["rows"]:
        flat = {k: v for k, v in row.items() if k not in _NESTED}
        flat |= {metric: row["quality"][metric], "n": row["quality"]["n"]}
        flat |= {f"{metric}_low": row["quality_interval"][0], f"{metric}_high": row["quality_interval"][1]}
        if any("against_source" in each for each in content["rows"]):
            flat |= {name: row.get("against_source", {}).get(key) for key, name in _COMPARED.items()}
        if any("seeds" in each for each in content["rows"]):
            found = row.get("seeds", {})
            flat |= {"seeds": len(found.get("seeds", ())), "seeds_mean": found.get("mean"), "seeds_sd": found.get("sd")}
        if any("energy" in each for each in content["rows"]):
            flat |= {name: row.get("energy", {}).get(key) for key, name in _ENERGY.items()}
        for entry in row["latency"]:
            low, high = entry.get("speedup_interval") or (None, None)
            figures = {**entry, "speedup_low": low, "speedup_high": high}
            flat |= {f"batch_{entry['batch_size']}_{key}": figures.get(key) for key in timed}
        for entry in row.get("latency_grid") or ():
            low, high = entry["speedup_interval"] or (None, None)
            figures = {**entry, "speedup_low": low, "speedup_high": high}
            cell = f"batch_{entry['batch_size']}_length_{entry['sequence_length']}"
            flat |= {f"{cell}_{key}": figures.get(key) for key in timed}
        for entry in row.get("sustained") or ():
            flat[f"sustained_samples_per_s_{entry['threads']}_threads"] = entry["samples_per_s"]
        for key, names in _FLATTENED.items():
            if _has(content, key):
                flat |= {f"{key}_{name}": (row.get(key) or {}).get(name) for name in names}
        if was_busy(content):
            flat |= {key: "busy" for key in flat if "speedup" in key or "cost_" in key}
        lines.append(flat)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def render_table(content: Mapping[str, Any], wide: bool = False) -> Table:
    """Renders the table for the terminal; what it leaves out is in `describe_left_out`."""
    from rich import box
    from rich.table import Table

    title = content["name"] + (" (timed on a busy machine)" if was_busy(content) else "")
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, collapse_padding=True, show_edge=False
    )
    shown, _ = split_columns(content, wide)
    table.add_column(shown[0].heading, overflow="fold", max_width=None if wide else _find_name_width(content))
    for column in shown[1:]:
        table.add_column(column.heading, justify="right", no_wrap=True)
    names = [str(row["stage"]) for row in content["rows"]] if wide else list_names(content, _find_name_width(content))
    for name, row in zip(names, content["rows"], strict=True):
        table.add_row(name, *(column.format(row) for column in shown[1:]))
    return table


def _find_name_width(content: Mapping[str, Any]) -> int:
    """Finds the width that is left for names in a table of `WIDTH` characters."""
    (_, *columns), _ = split_columns(content, wide=False)
    cells = ([column.heading, *(column.format(row) for row in content["rows"])] for column in columns)
    return max(WIDTH - sum(2 + max(map(len, column)) for column in cells), LEAST_NAME)


def describe_left_out(content: Mapping[str, Any], wide: bool = False) -> list[str]:
    """Lists the lines below the table: figures that all models have in common, and names in full."""
    _, constant = split_columns(content, wide)
    row, busy = content["rows"][0], was_busy(content)
    same = [f"{c.name} {c.format(row)}" for c in constant if not (busy and c.format(row) == "busy")]
    renamed = [] if wide else list_renamed(content, _find_name_width(content))
    return [
        *([f"the same for all: {', '.join(same)}"] if same else []),
        *(f"{name} = {full}" for name, full in renamed),
    ]
