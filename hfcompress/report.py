"""The report: read, written as JSON, CSV and Markdown, drawn as a table and as pictures."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.base.errors import HfcompressError

if TYPE_CHECKING:
    from rich.table import Table


def read(directory: Path) -> dict[str, Any]:
    """The report.json of a run directory.

    Raises:
        HfcompressError: where there is none.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise HfcompressError(f"{directory} holds no report.json", "`hfcompress run RECIPE` writes one")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fix = "delete it; the same `hfcompress run` measures again"
        raise HfcompressError(f"{path} is not JSON: {error}", fix) from None
    return content


def write(content: Mapping[str, Any], directory: Path) -> None:
    """Writes report.json, report.csv, report.md and, where matplotlib is installed, the pictures in plots/."""
    files = {
        "report.json": json.dumps(content, indent=2) + "\n",
        "report.csv": as_csv(content),
        "report.md": as_markdown(content),
    }
    for name, text in files.items():
        scratch = directory / f".{name}.partial"
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(directory / name)
    if importlib.util.find_spec("matplotlib") is not None:
        (directory / "plots").mkdir(exist_ok=True)
        for name, draw in pictures(content).items():
            draw(directory / "plots" / name)


def pictures(content: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """What can be drawn of a report: by the name of its file, what writes it there."""
    from hfcompress.plot import tradeoff
    from hfcompress.plot_pruning import PICTURES, drawn

    found: dict[str, Callable[[Path], None]] = {"tradeoff.png": partial(tradeoff, content)}
    for stage, notes in content.get("cuts", {}).items():
        found |= {f"{stage}-{key}.png": partial(PICTURES[key], stage, notes[key]) for key in drawn(notes)}
    return found


def metric_of(content: Mapping[str, Any]) -> str:
    """The name of the metric that the rows are judged by."""
    return next(name for name in content["rows"][0]["quality"] if name != "n")


def headings(content: Mapping[str, Any]) -> list[str]:
    """The table's columns."""
    sizes = [entry["batch_size"] for entry in content["rows"][0]["latency"]]
    energy = ["Wh / 1k"] if any(row["energy_wh_per_1k"] is not None for row in content["rows"]) else []
    embeddings = ["embeddings MB"] if _split(content) else []
    return [
        "model",
        metric_of(content),
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


def _split(content: Mapping[str, Any]) -> bool:
    """Whether it is known of any model what its embeddings take; reports of earlier versions do not say."""
    return any(row.get("embedding_bytes") is not None for row in content["rows"])


def cells(content: Mapping[str, Any]) -> list[list[str]]:
    """The table's rows as text; every figure is read from the report."""
    metric, source = metric_of(content), content["rows"][0]
    energy = any(row["energy_wh_per_1k"] is not None for row in content["rows"])
    found = []
    for row in content["rows"]:
        low, high = row["quality_interval"]
        base = source["quality"][metric]
        timed = [
            text
            for entry in row["latency"]
            for text in (f"{entry['p50_ms']:.2f}", "-" if entry["speedup"] is None else f"{entry['speedup']:.2f}x")
        ]
        found.append(
            [
                row["stage"],
                f"{row['quality'][metric]:.4f}",
                f"{low:.3f}-{high:.3f}",
                f"{row['quality'][metric] / base:.1%}" if base else "-",
                _millions(row["parameters"]),
                _millions(row["encoder_parameters"]),
                significant(row["disk_bytes"] / 1e6),
                *([_megabytes(row.get("embedding_bytes"))] if _split(content) else []),
                f"{row['compression']:.2f}x",
                *timed,
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                *([_energy(row["energy_wh_per_1k"])] if energy else []),
            ]
        )
    return found


def _megabytes(count: int | None) -> str:
    return "-" if count is None else significant(count / 1e6)


def _energy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def significant(value: float) -> str:
    """A positive figure with one decimal, or with three digits where it is small."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def count(number: float, noun: str) -> str:
    """A number and its noun, in the singular or the plural."""
    return f"{number:g} {noun}" + ("" if number == 1 else "s")


def _millions(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"


def conditions(content: Mapping[str, Any]) -> str:
    """One sentence on how the figures were measured."""
    source, machine, task = content["rows"][0], content["environment"], content["task"]
    entry = source["latency"][0]
    lengths = ", ".join(f"{e['sequence_length']} tokens at batch {e['batch_size']}" for e in source["latency"])
    where = (
        machine["accelerator"] if entry["device"] != "cpu" else f"{machine['cpu']} ({count(machine['cores'], 'core')})"
    )
    flags = f", {' '.join(machine['cpu_flags'])}" if machine["cpu_flags"] and entry["device"] == "cpu" else ""
    return (
        f"Quality on the {source['quality']['n']:,} rows of the {task['split']} split. Medians of interleaved rounds "
        f"on {where}{flags}, {count(entry['threads'], 'thread')}, each model in a process of its own, mean padded "
        f"length {lengths}. Peak memory is the whole process. MACs are counted at {task['max_length']} tokens."
    )


def as_markdown(content: Mapping[str, Any]) -> str:
    """The table and its conditions, for people."""
    head = headings(content)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(content)]
    return "\n".join(lines) + f"\n\n{conditions(content)}\n"


def as_csv(content: Mapping[str, Any]) -> str:
    """One line a model, one column a figure."""
    metric = metric_of(content)
    lines = []
    for row in content["rows"]:
        flat = {k: v for k, v in row.items() if k not in ("quality", "quality_interval", "latency")}
        flat |= {metric: row["quality"][metric], "n": row["quality"]["n"]}
        flat |= {f"{metric}_low": row["quality_interval"][0], f"{metric}_high": row["quality_interval"][1]}
        for entry in row["latency"]:
            prefix = f"batch_{entry['batch_size']}_"
            flat |= {prefix + key: entry[key] for key in ("p50_ms", "p95_ms", "samples_per_s", "speedup")}
        lines.append(flat)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def as_table(content: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=content["name"], title_justify="left", pad_edge=False)
    for index, heading in enumerate(headings(content)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in cells(content):
        table.add_row(*row)
    return table
