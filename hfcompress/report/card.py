"""The model card: the README.md that the Hub shows. Every figure in it is read from the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfcompress.models.artifact import MODELING_FILE, Artifact
from hfcompress.recipe.loader import Loaded
from hfcompress.report.changes import describe_changes
from hfcompress.report.conditions import find_metric, name_timing_command, render_conditions, was_busy
from hfcompress.report.hub_metadata import (
    METRIC_NAMES,
    find_base_model,
    find_dataset,
    list_stages,
    make_metadata,
    validate,
)
from hfcompress.report.plain_runtime import describe_plain_speedup
from hfcompress.report.sections import list_sections
from hfcompress.report.snippet import UNNAMED, write_snippet
from hfcompress.report.tables import render_markdown
from hfcompress.report.verdicts import describe_verdict
from hfcompress.utils.escape import Markdown, code, code_block, markdown
from hfcompress.utils.places import last_part, shorten_places
from hfcompress.utils.wording import format_ratio, significant


def render(loaded: Loaded, content: Mapping[str, Any], artifact: Artifact) -> str:
    """Renders the card of a model.

    Args:
        loaded: The recipe; the card embeds its file.
        content: The report.
        artifact: The model, in the directory of the card; `artifact.stage` names its row of the report.

    Raises:
        HfcompressError: if the Hub would refuse the card.
    """
    row = next(row for row in content["rows"] if row["stage"] == artifact.stage)
    metadata = Markdown(make_metadata(loaded, content, row, artifact).to_yaml())
    template = _make_environment().get_template("card.md")
    values = _collect_values(loaded, content, row, artifact)
    text = template.render(card_data=metadata, **values).strip() + "\n"
    validate(text)
    return text


def _make_environment() -> Any:
    """Makes a Jinja environment that escapes every value, unless it is `Markdown`."""
    from jinja2 import Environment, FileSystemLoader

    templates = FileSystemLoader(Path(__file__).with_name("templates"))
    environment = Environment(loader=templates, finalize=markdown, keep_trailing_newline=True)
    environment.filters["code"] = code
    environment.filters["paragraphs"] = lambda facts: Markdown("\n\n".join(map(markdown, facts)))
    return environment


def _collect_values(
    loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], artifact: Artifact
) -> dict[str, Any]:
    """Collects the values that the template names."""
    from hfcompress import __version__

    recipe, metric, source, busy = loaded.recipe, find_metric(content), content["rows"][0], was_busy(content)
    base = source["quality"][metric]
    return {
        "name": recipe.name,
        "version": __version__,
        "base": find_base_model(loaded) or last_part(recipe.model),
        "row": row,
        "source": source,
        "metric": METRIC_NAMES.get(metric, metric).lower(),
        "value": row["quality"][metric],
        "low": row["quality_interval"][0],
        "high": row["quality_interval"][1],
        "share": row["quality"][metric] / base if base else None,
        "mb": lambda count: significant(count / 1e6),
        "busy": busy,
        "timing_command": Markdown(name_timing_command(content)),
        "speeds": [] if busy else [Markdown(_describe_speed(entry)) for entry in row["latency"] if entry["speedup"]],
        "verdict": describe_verdict(content, row) if "against_source" in row else "",
        "changes": describe_changes(content, row),
        "table": Markdown(render_markdown(content).partition("\n\n")[0]),
        "conditions": render_conditions(content),
        "made": [stage.describe() for stage in list_stages(loaded, artifact)],
        "sections": list(list_sections(content, artifact.path)),
        "limits": _list_limits(loaded, artifact),
        "plot": (artifact.path / "tradeoff.png").is_file(),
        "recipe": code_block(shorten_places(loaded.document.text).rstrip("\n"), "yaml"),
        "overrides": [_hide_places(assignment) for assignment in loaded.document.overrides],
        "snippet": code_block(write_snippet(recipe.task, artifact, recipe.hub.repo or UNNAMED), "python"),
        "dataset": find_dataset(loaded) or last_part(recipe.task.dataset),
        "remote_code": (artifact.path / MODELING_FILE).is_file() and artifact.runtime == "torch",
    }


def _list_limits(loaded: Loaded, artifact: Artifact) -> list[str]:
    """Lists what a user should know before relying on the model."""
    limits = [
        f"It was evaluated on one data set, with at most {loaded.recipe.task.max_length} tokens a text. Evaluate it on "
        "your own data.",
        "It inherits the knowledge and the biases of its source and its data. A smaller model can get worse on rare "
        "cases first, and an average does not show that.",
        "Speed depends on the processor, the batch size and the length of the texts. The speed-ups above are ratios on "
        "one machine.",
    ]
    if artifact.dtype == "int8" and artifact.runtime == "onnx":
        limits.append(
            "int8 is fast on processors with int8 instructions (AVX512-VNNI, AMX, ARM dot product). Others gain less."
        )
    return limits + list_stages(loaded, artifact)[-1].limits()


def _describe_speed(entry: Mapping[str, Any]) -> str:
    """Describes the speed-up at a batch size, with its interval if that is wide."""
    faster, factor, ends = entry["speedup"] >= 1, entry["speedup"], entry.get("speedup_interval")
    if not faster:
        factor, ends = 1 / factor, ends and [1 / end for end in reversed(ends)]
    interval = f" ({'-'.join(map(format_ratio, ends))})" if ends and not entry["narrow"] else ""
    compression = describe_plain_speedup(entry)
    share = f" ({compression})" if compression else ""
    return f"**{factor:.1f}x**{interval} {'faster' if faster else 'slower'} at batch {entry['batch_size']}{share}"


def _hide_places(assignment: str) -> str:
    """Shortens paths on this machine to their last part, in the value of `KEY=VALUE`."""
    key, _, value = assignment.partition("=")
    return f"{key}={shorten_places(value)}"
