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

from hfcompress.report.plots import draw_tradeoff
from hfcompress.report.sections import list_figures
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.escape import Markdown, markdown
from hfcompress.utils.files import write_text
from hfcompress.utils.wording import count, significant

if TYPE_CHECKING:
    from rich.table import Table


SCHEMA = 2
"""The version of report.json: 2 has `against_source` in each row but the first, and `labels`."""


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
        write_text(directory / name, text)
    if importlib.util.find_spec("matplotlib") is not None:
        (directory / "plots").mkdir(exist_ok=True)
        for name, draw in pictures(content).items():
            draw(directory / "plots" / name)


def pictures(content: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Lists the pictures of a report: by file name, the function that writes it to a path."""
    return {"tradeoff.png": partial(draw_tradeoff, content), **list_figures(content)}


def metric_of(content: Mapping[str, Any]) -> str:
    """The name of the metric that the rows are judged by."""
    return next(name for name in content["rows"][0]["quality"] if name != "n")


def busy(content: Mapping[str, Any]) -> bool:
    """Whether the machine did other work while models were timed; reports of earlier versions do not say."""
    return bool(content.get("machine", {}).get("busy"))


def measure_again(content: Mapping[str, Any]) -> str:
    """How to time the models of a report anew."""
    return "`hfcompress report RUN --measure`" if "key" in content else "the same `hfcompress evaluate`"


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
            for text in (f"{entry['p50_ms']:.2f}", "busy" if busy(content) else _faster(entry))
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


def _faster(entry: Mapping[str, Any]) -> str:
    """`3.90x (3.82-3.98)`: a speed-up and its interval, where there is one that says more than the ratio does."""
    if entry["speedup"] is None:
        return "-"
    told = [ratio(value) for value in entry.get("speedup_interval") or ()]
    return f"{entry['speedup']:.2f}x" + (f" ({'-'.join(told)})" if len(set(told)) > 1 else "")


def ratio(value: float) -> str:
    """A ratio with three digits or so."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else significant(count / 1e6)


def _energy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _millions(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count:,}"


def conditions(content: Mapping[str, Any]) -> str:
    """A few sentences on how the figures were measured, and on whether the speeds can be believed."""
    source, task = content["rows"][0], content["task"]
    lengths = ", ".join(f"{e['sequence_length']} tokens at batch {e['batch_size']}" for e in source["latency"])
    sentences = [
        f"Quality on the {source['quality']['n']:,} rows of the {task['split']} split.",
        f"Medians of interleaved rounds on {_where(content)}, {_threads(content)}, each model in a process of its own, "
        f"mean padded length {lengths}.",
        *([_busy_sentence(content)] if busy(content) else _interval_sentences(content)),
        *_widened(content),
        f"Peak memory is the whole process. MACs are counted at {task['max_length']} tokens.",
    ]
    return " ".join(sentences)


def _where(content: Mapping[str, Any]) -> str:
    """What the models were timed on, which need not be what the rest was measured on."""
    found = {**content["environment"], **content.get("machine", {})}
    if content["rows"][0]["latency"][0]["device"] != "cpu":
        return str(found["accelerator"])
    flags = f", {' '.join(found['cpu_flags'])}" if found["cpu_flags"] else ""
    return f"{found['cpu']} ({count(found['cores'], 'core')}){flags}"


def _threads(content: Mapping[str, Any]) -> str:
    """On how many threads each model ran."""
    tried, entries = content.get("machine", {}).get("threads", ()), content["rows"][0]["latency"]
    if len(tried) < 2 or entries[0]["device"] != "cpu":
        return count(entries[0]["threads"], "thread")
    chosen = ", ".join(f"{entry['threads']} at batch {entry['batch_size']}" for entry in entries)
    *fewer, most = map(str, tried)
    graphs = any(entry["runtime"] != "torch" for row in content["rows"] for entry in row["latency"])
    rest = f", graphs on {most}" if graphs else ""
    return f"PyTorch on the fastest of {', '.join(fewer)} and {most} threads (source: {chosen}){rest}"


def _busy_sentence(content: Mapping[str, Any]) -> str:
    why = "; ".join(content["machine"].get("why", ()))
    return (
        f"The machine was busy{f' ({why})' if why else ''}: these times are too long, each by another factor, "
        f"so no speed-up is told. Time the models anew once it is quiet: {measure_again(content)}."
    )


def _interval_sentences(content: Mapping[str, Any]) -> list[str]:
    """What stands beside the speed-ups, and which of them are not known well."""
    entries = [(row["stage"], entry) for row in content["rows"][1:] for entry in row["latency"]]
    if not any(entry.get("speedup_interval") for _, entry in entries):
        return []
    rounds = sorted({entry["rounds"] for _, entry in entries})
    told = count(rounds[0], "round") if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds"
    found = [f"Beside a speed-up stands the 95% interval of its median over {told}."]
    wide = [f"{stage} at batch {e['batch_size']}" for stage, e in entries if e["speedup"] and not e.get("narrow", True)]
    if wide:
        found.append(f"Times varied too much to know it within 5%: {', '.join(wide)}.")
    return found


def _widened(content: Mapping[str, Any]) -> list[str]:
    """Which models were run in more bits than they are stored in."""
    entries = [(row["stage"], row["latency"][0]) for row in content["rows"]]
    told = [f"{stage} (stored in {e['stored']}) in {e['dtype']}" for stage, e in entries if e.get("stored")]
    return [f"Run as training computes: {', '.join(told)}."] if told else []


def as_markdown(content: Mapping[str, Any]) -> str:
    """The table and its conditions, for people."""
    head = headings(content)
    lines = ["| " + " | ".join(map(markdown, head)) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(markdown, row)) + " |" for row in cells(content)]
    return "\n".join(lines) + f"\n\n{conditions_as_markdown(content)}\n"


def conditions_as_markdown(content: Mapping[str, Any]) -> Markdown:
    """`conditions`, whose names of machines are shown literally, and whose command as one."""
    command = measure_again(content)
    return Markdown(markdown(conditions(content)).replace(markdown(command), command))


def as_csv(content: Mapping[str, Any]) -> str:
    """One line a model, one column a figure."""
    metric = metric_of(content)
    lines = []
    for row in content["rows"]:
        flat = {k: v for k, v in row.items() if k not in ("quality", "quality_interval", "latency")}
        flat |= {metric: row["quality"][metric], "n": row["quality"]["n"]}
        flat |= {f"{metric}_low": row["quality_interval"][0], f"{metric}_high": row["quality_interval"][1]}
        for entry in row["latency"]:
            low, high = entry.get("speedup_interval") or (None, None)
            told = {**entry, "speedup_low": low, "speedup_high": high}
            flat |= {f"batch_{entry['batch_size']}_{key}": told.get(key) for key in _TIMED}
        if busy(content):
            flat |= {key: "busy" for key in flat if "speedup" in key}
        lines.append(flat)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


_TIMED = ("p50_ms", "p95_ms", "samples_per_s", "speedup", "speedup_low", "speedup_high", "rounds", "threads")
"""Columns of the CSV for each batch size."""


def as_table(content: Mapping[str, Any]) -> Table:
    """The table for the terminal."""
    from rich import box
    from rich.table import Table

    title = content["name"] + (" (timed on a busy machine)" if busy(content) else "")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for index, heading in enumerate(headings(content)):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in cells(content):
        table.add_row(*row)
    return table
