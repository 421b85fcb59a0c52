"""The tables of a card: the source against the model, and the models after each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.report.card_summary import find_recovery
from hfcompress.report.conditions import find_metric, was_busy
from hfcompress.report.costs import list_row_costs
from hfcompress.report.hub_metadata import METRIC_NAMES
from hfcompress.report.plain_runtime import ONNX, list_plain_runtimes
from hfcompress.report.seeds import describe_seed_change, format_spread
from hfcompress.report.tables import format_cells, list_headings
from hfcompress.report.verdicts import describe_mcnemar, format_change, format_p
from hfcompress.utils.escape import Markdown, markdown
from hfcompress.utils.wording import format_ratio, significant

if TYPE_CHECKING:
    from hfcompress.data.task import Task

MOST_COLUMNS = 8
"""Columns of the table of all stages: more do not fit on a page of the Hub."""
_VERDICTS = {"shown": "ruled out", "not shown": "not ruled out", "worse": "shown"}

Cells = Sequence[str]


def render_comparison(task: Task, content: Mapping[str, Any], row: Mapping[str, Any]) -> Markdown:
    """Renders the table of the source against a model: quality, verdict, size, latency, memory and what else is known.

    Args:
        task: The task that both were asked.
        content: The report.
        row: The model's row of the report.
    """
    source = content["rows"][0]
    rows = [
        *_list_quality(task, content, source, row),
        *_list_sizes(source, row),
        *_list_latencies(content, source, row),
        *_list_costs(content, source, row),
    ]
    return render_table(("", "source", "this model", "difference"), rows)


def _describe_margin_test(found: Mapping[str, Any]) -> str:
    """Names the test of the margin; its p-value is that of "no such loss", so a loss that is shown has none here."""
    if "margin_test" not in found:
        return str(found["why"])
    p_value = "" if found["verdict"] == "worse" else f", p {format_p(found['p_margin'])}"
    return f"{found['margin_test']}{p_value}"


def render_stages(content: Mapping[str, Any]) -> Markdown:
    """Renders the table of the source and of the model after each stage, with the columns that matter most."""
    head = list_headings(content, wide=False)[:MOST_COLUMNS]
    return render_table(head, [cells[: len(head)] for cells in format_cells(content, wide=False)])


def render_table(head: Cells, rows: Sequence[Cells]) -> Markdown:
    """Renders a table in Markdown; every cell is escaped, unless it is `Markdown`."""
    first, *others = ("| " + " | ".join(map(markdown, cells)) + " |" for cells in (head, *rows))
    return Markdown("\n".join([first, "|" + "---|" * len(head), *others]))


def _list_quality(
    task: Task, content: Mapping[str, Any], source: Mapping[str, Any], row: Mapping[str, Any]
) -> Iterator[Cells]:
    metric = find_metric(content)
    before, after = source["quality"][metric], row["quality"][metric]
    recovery, found = find_recovery(task, before, after), row.get("against_source", {})
    share = "" if recovery is None else f"{recovery:.1%} of the source's"
    scores = [
        f"{each['quality'][metric]:.4f} ({_join_interval(each['quality_interval'], '.3f')})" for each in (source, row)
    ]
    yield (f"{METRIC_NAMES.get(metric, metric)} (95% interval)", *scores, share)
    if "seeds" in row:
        several = [format_spread(each["seeds"]) if "seeds" in each else "" for each in (source, row)]
        heading = f"{METRIC_NAMES.get(metric, metric)} of {len(row['seeds']['seeds'])} seeds, mean ± standard deviation"
        yield (heading, *several, describe_seed_change(row["seeds"]))
    if "change" in found:
        yield ("change on the same rows", "", format_change(found), found["reading"])
    if "verdict" in found:
        test = _describe_margin_test(found)
        yield (f"loss of more than {found['margin']}", "", _VERDICTS[found["verdict"]], test)
    if "broken" in found:
        flips = f"{found['broken']} and {found['repaired']} of {found['units']:,}"
        yield ("answers that became wrong, and right", "", flips, describe_mcnemar(found))


def _list_sizes(source: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Cells]:
    yield (
        "weights on disk",
        *_megabytes(source, row, "disk_bytes"),
        _compare(source, row, "disk_bytes", "smaller", "larger"),
    )
    if row.get("embedding_bytes") and source.get("embedding_bytes"):
        ratio = _compare(source, row, "embedding_bytes", "smaller", "larger")
        yield ("of which embeddings", *_megabytes(source, row, "embedding_bytes"), ratio)
    parts = [each.get("bytes_by_part") or {} for each in (source, row)]
    if all(part.get("encoder") for part in parts):
        before, after = parts
        ratio = _compare(before, after, "encoder", "smaller", "larger")
        yield ("of which layers", *_megabytes(before, after, "encoder"), ratio)
    if row.get("parameters") and source.get("parameters"):
        counts = [f"{each['parameters']:,}" for each in (source, row)]
        yield ("parameters", *counts, _compare(source, row, "parameters", "fewer", "more"))


def _list_latencies(content: Mapping[str, Any], source: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Cells]:
    """Lists median and 95th percentile at each batch size, also against the source in ONNX Runtime."""
    busy, plain = was_busy(content), {each["name"]: each["latency"] for each in list_plain_runtimes(content)}
    for number, (before, after) in enumerate(zip(source["latency"], row["latency"], strict=True)):
        name = f"latency, batch {after['batch_size']}: median (p95)"
        ratio = "the machine was busy" if busy else _describe_speedup(after, "speedup")
        yield (name, _format_times(before), _format_times(after), ratio)
        runtime = after.get("plain", ONNX)
        if runtime in plain and after.get("speedup_plain") and after["runtime"] != "torch" and not busy:
            times, ratio = _format_times(plain[runtime][number]), _describe_speedup(after, "speedup_plain")
            yield (f"against the {runtime}", times, _format_times(after), ratio)
    before, after = (each.get("cold_start") or {} for each in (source, row))
    if before and after:
        seconds = [f"{start['seconds']:.2f} s" for start in (before, after)]
        ratio = "the machine was busy" if busy else _compare(before, after, "seconds", "faster", "slower")
        yield ("cold start, to the first answer", *seconds, ratio)


def _list_costs(content: Mapping[str, Any], source: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Cells]:
    """Lists memory, and what a report need not have: memory of the GPU, energy, CO2 and money."""
    memory = [f"{each['peak_memory_bytes'] / 1e6:.0f} MB" for each in (source, row)]
    yield ("peak memory of the process", *memory, _compare(source, row, "peak_memory_bytes", "less", "more"))
    if row.get("device_memory_bytes") and source.get("device_memory_bytes"):
        memory = [f"{each['device_memory_bytes'] / 1e6:.0f} MB" for each in (source, row)]
        yield ("peak memory of the GPU", *memory, _compare(source, row, "device_memory_bytes", "less", "more"))
    for name, unit, before, after in list_row_costs(content, row):
        if before is not None and after is not None:
            figures = [f"{value:.4g} {unit}".rstrip() for value in (before, after)]
            yield (name, *figures, _describe_ratio(before, after, "less", "more"))


def _describe_speedup(entry: Mapping[str, Any], key: str) -> str:
    """Describes a speed-up with its interval, `3.90x faster (3.82-3.98)`; of a slower model, how much slower it is."""
    factor, ends = entry[key], entry.get(f"{key}_interval") or ()
    if factor is None:
        return ""
    if factor < 1:
        factor, ends = 1 / factor, [1 / end for end in reversed(ends)]
    interval = f" ({_join_interval(ends)})" if len({*map(format_ratio, ends)}) > 1 else ""
    return f"{format_ratio(factor)}x {'faster' if entry[key] >= 1 else 'slower'}{interval}"


def _join_interval(ends: Sequence[float], form: str = "") -> str:
    return "-".join(format(end, form) if form else format_ratio(end) for end in ends)


def _format_times(entry: Mapping[str, Any]) -> str:
    return f"{entry['p50_ms']:.2f} ({entry['p95_ms']:.2f}) ms"


def _megabytes(source: Mapping[str, Any], row: Mapping[str, Any], key: str) -> list[str]:
    return [f"{significant(each[key] / 1e6)} MB" for each in (source, row)]


def _compare(source: Mapping[str, Any], row: Mapping[str, Any], key: str, less: str, more: str) -> str:
    """Compares a figure of the source and of a model of which less is better."""
    return _describe_ratio(source[key], row[key], less, more)


def _describe_ratio(before: float, after: float, less: str, more: str) -> str:
    factor = before / after if before and after else 1.0
    if abs(factor - 1) < 0.005:
        return "the same"
    return f"{format_ratio(factor)}x {less}" if factor > 1 else f"{format_ratio(1 / factor)}x {more}"
