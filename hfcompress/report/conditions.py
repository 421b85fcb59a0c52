"""Sentences on how the figures of a report were measured, and on how far its speeds can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfcompress.report.costs import describe_costs
from hfcompress.report.plain_runtime import list_plain_runtimes
from hfcompress.utils.escape import Markdown, markdown
from hfcompress.utils.wording import count, join


def find_metric(content: Mapping[str, Any]) -> str:
    """Finds the name of the metric that the rows are compared by."""
    return next(name for name in content["rows"][0]["quality"] if name != "n")


def was_busy(content: Mapping[str, Any]) -> bool:
    """True if the machine did other work while models were timed; False for a report of a version that did not look."""
    return bool(content.get("machine", {}).get("busy"))


def name_timing_command(content: Mapping[str, Any]) -> str:
    """Names the command that times the models of a report again."""
    return "`hfcompress report RUN --measure`" if "key" in content else "the same `hfcompress evaluate`"


def describe_conditions(content: Mapping[str, Any]) -> str:
    """Describes in a few sentences how the figures were measured."""
    return " ".join(list_conditions(content))


def list_conditions(content: Mapping[str, Any]) -> list[str]:
    """Lists sentences on how the figures were measured."""
    source, task = content["rows"][0], content["task"]
    lengths = ", ".join(f"{e['sequence_length']} tokens at batch {e['batch_size']}" for e in source["latency"])
    device, threads = _describe_device(content), _describe_threads(content)
    return [
        f"Quality is measured on the {source['quality']['n']:,} rows of the {task['split']} split.",
        f"Times are medians of interleaved rounds on {device}, {threads}, each model in a process of its own. "
        f"The mean padded length is {lengths}.",
        *([_describe_busy_machine(content)] if was_busy(content) else _describe_intervals(content)),
        *([] if was_busy(content) else _describe_plain_runtime(content)),
        *_describe_casts(content),
        *describe_costs(content),
        *_describe_cold_starts(content),
        f"Peak memory is that of the whole process{_describe_gpu_memory(content)}. "
        f"MACs are counted at {task['max_length']} tokens.",
    ]


def render_conditions(content: Mapping[str, Any]) -> Markdown:
    """Renders `describe_conditions` as Markdown: names of machines literally, the command as code."""
    return Markdown(" ".join(render_sentences(content)))


def render_sentences(content: Mapping[str, Any]) -> list[Markdown]:
    """Renders `list_conditions` as Markdown."""
    command = name_timing_command(content)
    return [Markdown(markdown(told).replace(markdown(command), command)) for told in list_conditions(content)]


def _describe_device(content: Mapping[str, Any]) -> str:
    """Describes the device that timed the models; `machine` is newer than `environment` if they were timed again."""
    found = {**content["environment"], **content.get("machine", {})}
    if content["rows"][0]["latency"][0]["device"] != "cpu":
        return str(found["accelerator"])
    return describe_processor(found)


def describe_processor(found: Mapping[str, Any]) -> str:
    """Describes the processor of an environment, with its cores and vector instructions."""
    flags = f", {' '.join(found['cpu_flags'])}" if found["cpu_flags"] else ""
    return f"{found['cpu']} ({count(found['cores'], 'core')}){flags}"


def _describe_threads(content: Mapping[str, Any]) -> str:
    """Describes the number of threads that each model ran on."""
    tried, entries = content.get("machine", {}).get("threads", ()), content["rows"][0]["latency"]
    if len(tried) < 2 or entries[0]["device"] != "cpu":
        return count(entries[0]["threads"], "thread")
    chosen = ", ".join(f"{entry['threads']} at batch {entry['batch_size']}" for entry in entries)
    *fewer, most = map(str, tried)
    graphs = any(entry["runtime"] != "torch" for row in content["rows"] for entry in row["latency"])
    rest = f", graphs on {most}" if graphs else ""
    return f"PyTorch on the fastest of {', '.join(fewer)} and {most} threads (source: {chosen}){rest}"


def _describe_busy_machine(content: Mapping[str, Any]) -> str:
    why = "; ".join(content["machine"].get("why", ()))
    return (
        f"The machine was busy{f' ({why})' if why else ''}. These times are too long, each by a different factor, "
        f"so no speed-up is reported. Time the models again when it is quiet: {name_timing_command(content)}."
    )


def _describe_intervals(content: Mapping[str, Any]) -> list[str]:
    """Explains the intervals beside the speed-ups, and lists the speed-ups that are not known well."""
    entries = [(row["stage"], entry) for row in content["rows"][1:] for entry in row["latency"]]
    if not any(entry.get("speedup_interval") for _, entry in entries):
        return []
    rounds = sorted({entry["rounds"] for _, entry in entries})
    number = count(rounds[0], "round") if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds"
    sentences = [f"Each speed-up has the 95% interval of its median over {number}."]
    wide = [f"{stage} at batch {e['batch_size']}" for stage, e in entries if e["speedup"] and not e.get("narrow", True)]
    if wide:
        sentences.append(f"The times of these varied too much to know the speed-up within 5%: {', '.join(wide)}.")
    return sentences


def _describe_plain_runtime(content: Mapping[str, Any]) -> list[str]:
    """Says how fast the unchanged source is in other runtimes, and the last model compared with the fastest of them."""
    plain, last = list_plain_runtimes(content), content["rows"][-1]
    alone = [(each["name"], speedups) for each in plain if (speedups := _list_speedups(each["latency"]))]
    told = "; ".join(f"the {name} has a speed-up of {speedups}" for name, speedups in alone)
    sentences = [f"Without compression, {told}."] if alone else []
    rest = _list_speedups(last["latency"], "speedup_plain")
    against = "the fastest of these at each batch size" if len(plain) > 1 else "that"
    return [*sentences, *([f"Compared with {against}, {last['stage']} has one of {rest}."] if plain and rest else [])]


def _list_speedups(latency: Sequence[Mapping[str, Any]], key: str = "speedup") -> str:
    return join([f"{e[key]:.2f}x at batch {e['batch_size']}" for e in latency if e.get(key)] or [""])


def _describe_cold_starts(content: Mapping[str, Any]) -> list[str]:
    starts = (content["rows"][0].get("cold_start") or {}).get("starts", 0)
    return [
        "A cold start is the time from the start of a process to its first answer, with the model's files in memory; "
        f"it is the median of {count(starts, 'start')}."
    ] * bool(starts)


def _describe_gpu_memory(content: Mapping[str, Any]) -> str:
    known = any(row.get("device_memory_bytes") is not None for row in content["rows"])
    return "; that of the GPU is the memory of PyTorch's tensors" if known else ""


def describe_batch_sensitivity(row: Mapping[str, Any]) -> str:
    """Says how far the answers of a quantized model depend on the other rows of the batch; empty if unknown."""
    found = row.get("batch_sensitivity")
    if not found:
        return ""
    size = f"the largest change of a logit is {found['largest_difference']:.2g}"
    if not found["largest_difference"]:
        return f"The first {found['rows']:,} answers do not depend on the other rows of their batch."
    if found["answers_changed"] is None:
        return f"A score depends a little on the other rows of the batch: {size} in {found['rows']:,} answers."
    return (
        f"An answer can depend on the other rows of the batch: {found['answers_changed']} of the first "
        f"{found['rows']:,} answers change if rows are answered alone or in the order of the file; {size}."
    )


def _describe_casts(content: Mapping[str, Any]) -> list[str]:
    """Lists the models that ran in another number type than they are stored in."""
    entries = [(row["stage"], row["latency"][0]) for row in content["rows"]]
    casts = [f"{stage} (stored in {e['stored']}) in {e['dtype']}" for stage, e in entries if e.get("stored")]
    return [f"Run in another number type than stored: {', '.join(casts)}."] if casts else []
