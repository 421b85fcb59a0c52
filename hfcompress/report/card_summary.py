"""The first sentences of a card: what the model is, and how small, fast and good it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import BUILTIN
from hfcompress.report.conditions import find_metric, name_timing_command, was_busy
from hfcompress.report.hub_metadata import METRIC_NAMES, find_base_model, find_dataset, list_stages
from hfcompress.report.plain_runtime import ONNX
from hfcompress.report.verdicts import describe_margin, format_change
from hfcompress.utils.escape import Markdown, code, markdown
from hfcompress.utils.places import last_part
from hfcompress.utils.wording import count, format_ratio, join, significant

if TYPE_CHECKING:
    from hfcompress.context import Stage
    from hfcompress.data.task import Task
    from hfcompress.models.artifact import Artifact
    from hfcompress.recipe.loader import Loaded

_FORMATS = {"onnx": "an ONNX graph", "openvino": "an OpenVINO graph", "torch": "a PyTorch model"}
"""Models, by runtime."""
_PLAIN = ("accuracy", "mse", "precision", "recall", "exact_match", "perplexity")
"""Metrics whose names are common words."""
MOST_CLASSES = 6
"""Classes that are listed at most."""
MOST_SIZES = 3
"""Batch sizes whose speed-ups are told at most."""


def describe_model(loaded: Loaded, content: Mapping[str, Any], artifact: Artifact) -> Markdown:
    """Says what a model does, what it was made from, by which steps, and what is in the repository."""
    recipe = loaded.recipe
    purpose = markdown(recipe.task.purpose) + _list_classes(recipe.task, content.get("labels") or ())
    steps = join([_describe_steps(word, list(stages)) for word, stages in _group_stages(loaded, artifact)])
    version = content["environment"].get("versions", {}).get("hfcompress", "")
    tool = markdown(f"compressed with hfcompress {version}".strip())
    return Markdown(
        f"**{markdown(recipe.name)}** {purpose}. It is {_name_base(loaded)}, {tool}: {steps}. "
        f"The result is {_FORMATS[artifact.runtime]} with {markdown(artifact.dtype)} weights."
    )


def _name_base(loaded: Loaded) -> str:
    model, base = loaded.recipe.model, find_base_model(loaded)
    if base is not None:
        return code(base)
    return f"{'the built-in model' if model == BUILTIN else 'the local model'} {code(last_part(model))}"


def _list_classes(task: Task, labels: Sequence[str]) -> str:
    pairs = len(task.text) == 2 and task.head == "sequence"
    noun = ", a pair at a time" if pairs else ""
    if task.head != "sequence" or not 1 < len(labels) <= MOST_CLASSES:
        return noun
    *others, last = map(code, labels)
    return f" as {', '.join(others)} or {last}{noun}"


def _group_stages(loaded: Loaded, artifact: Artifact) -> Iterator[tuple[str, Iterator[Stage]]]:
    return groupby(list_stages(loaded, artifact), key=lambda stage: stage.participle)


def _describe_steps(word: str, stages: Sequence[object]) -> str:
    return word if len(stages) == 1 else f"{word} in {count(len(stages), 'stage')}"


def describe_result(loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any]) -> Markdown:
    """Says how good, small and fast a model is against its source, and the verdict at the margin."""
    source, metric = content["rows"][0], find_metric(content)
    quality = _describe_quality(loaded.recipe.task, metric, source, row)
    speeds = [] if was_busy(content) else [entry for entry in row["latency"] if entry["speedup"]][:MOST_SIZES]
    sentences = [f"{quality} {join([_describe_size(row), *map(_describe_speed, speeds)])}."]
    sentences += _describe_runtime(speeds)
    if was_busy(content):
        sentences.append(
            "Its speed is not reported, because the machine was **busy** when it was timed. To time it again: "
            f"{name_timing_command(content)}."
        )
    return Markdown(" ".join(sentences))


def describe_judgement(row: Mapping[str, Any]) -> Markdown:
    """Gives the verdict on the loss; empty for a report of an earlier version."""
    found = row.get("against_source", {})
    if "not_compared" in found:
        return Markdown(f"**No verdict**: {markdown(found['not_compared'])}.")
    if "verdict" not in found:
        return Markdown("")
    badge = {"shown": "within {}", "worse": "worse by more than {}", "not shown": "not shown to be within {}"}
    told = badge[found["verdict"]].format(found["margin"])
    reading = {"within noise": "is within noise", "worse": "is a real loss", "better": "is a real gain"}
    change = f"The change, {format_change(found)}, {reading[found['reading']]}."
    margin = f" {markdown(describe_margin(found))}" if found["verdict"] != "worse" else ""
    return Markdown(f"**Verdict: {markdown(told)}.**{margin} {change}")


def name_metric(metric: str) -> str:
    """Names a metric inside a sentence: `accuracy`, `F1`, `Matthews correlation`."""
    name = METRIC_NAMES.get(metric, metric)
    return name.lower() if metric in _PLAIN else name


def find_recovery(task: Task, before: float, after: float) -> float | None:
    """Finds the share of the source's score that a model keeps; None if a share of this metric means nothing."""
    return after / before if task.greater_is_better and before > 0 else None


def _describe_quality(task: Task, metric: str, source: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    before, after = source["quality"][metric], row["quality"][metric]
    name, recovery = markdown(name_metric(metric)), find_recovery(task, before, after)
    if recovery is None:
        return f"Its {name} is **{after:.4f}** (the source's is {before:.4f}); it is"
    return f"It has **{recovery:.1%}** of its source's {name} ({after:.4f} against {before:.4f}) and is"


def _describe_size(row: Mapping[str, Any]) -> str:
    size = compare(row["compression"], "smaller", "larger", "as large")
    return f"**{size}** ({significant(row['disk_bytes'] / 1e6)} MB)"


def _describe_speed(entry: Mapping[str, Any]) -> str:
    """Describes the speed-up at a batch size, with its interval if that is wide."""
    faster, ends = entry["speedup"] >= 1, entry.get("speedup_interval")
    if ends and not faster:
        ends = [1 / end for end in reversed(ends)]
    interval = f" ({'-'.join(map(format_ratio, ends))})" if ends and not entry["narrow"] else ""
    return f"**{compare(entry['speedup'], 'faster', 'slower', 'as fast')}**{interval} at batch {entry['batch_size']}"


def compare(factor: float, more: str, less: str, same: str) -> str:
    """Formats a ratio as `2.0x faster`, `2.0x slower` or `as fast`."""
    if f"{factor:.1f}" == f"{1 / factor:.1f}" == "1.0":
        return same
    return f"{factor:.1f}x {more}" if factor >= 1 else f"{1 / factor:.1f}x {less}"


def _describe_runtime(speeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how much of the speed-up is left against the source in the plain runtime that is fastest there."""
    known = [entry for entry in speeds if entry.get("speedup_plain") and entry["runtime"] != "torch"]
    if not known:
        return []
    shares: dict[str, list[str]] = {}
    for entry in known:
        share = f"{compare(entry['speedup_plain'], 'faster', 'slower', 'as fast')} at batch {entry['batch_size']}"
        shares.setdefault(markdown(entry.get("plain", ONNX)), []).append(share)
    told = [f"against the {runtime}, it is {join(found)}" for runtime, found in shares.items()]
    return [f"Part of that is the runtime's: {'; '.join(told)}."]


def describe_source(loaded: Loaded, content: Mapping[str, Any]) -> Markdown:
    """Says which model and which rows the figures of the table come from."""
    recipe, task = loaded.recipe, content["task"]
    base = code(find_base_model(loaded) or last_part(recipe.model))
    tuned = [number for number, stage in enumerate(recipe.stages, 1) if not stage.compresses]
    source = f"the model after step {tuned[-1]}" if tuned else base
    dataset = code(find_dataset(loaded) or last_part(recipe.task.dataset))
    split = content.get("dataset_split") or task["split"]
    rows = f"{content['rows'][0]['quality']['n']:,}"
    return Markdown(f"*Source: {source}. Quality: the {rows} rows of the {markdown(split)} split of {dataset}.*")
