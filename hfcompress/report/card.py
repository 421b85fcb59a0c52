"""The model card: the README.md that the Hub shows. Every figure in it is read from the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfcompress.models.artifact import Artifact
from hfcompress.recipe.loader import Loaded
from hfcompress.report.card_summary import describe_judgement, describe_model, describe_result, describe_source
from hfcompress.report.card_table import render_comparison, render_stages
from hfcompress.report.changes import describe_changes
from hfcompress.report.conditions import find_metric, render_sentences
from hfcompress.report.effort import describe_effort
from hfcompress.report.hub_metadata import list_stages, make_metadata, validate
from hfcompress.report.provenance import list_provenance
from hfcompress.report.sections import list_sections
from hfcompress.report.snippet import UNNAMED, write_snippets
from hfcompress.utils.escape import Markdown, code, code_block, markdown
from hfcompress.utils.places import shorten_places


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
    environment.filters["code_block"] = code_block
    environment.filters["paragraphs"] = lambda facts: Markdown("\n\n".join(map(markdown, facts)))
    return environment


def _collect_values(
    loaded: Loaded, content: Mapping[str, Any], row: Mapping[str, Any], artifact: Artifact
) -> dict[str, Any]:
    """Collects the values that the template names."""
    recipe = loaded.recipe
    return {
        "name": recipe.name,
        "metric": find_metric(content),
        "model": describe_model(loaded, content, artifact),
        "result": describe_result(loaded, content, row),
        "judgement": describe_judgement(row),
        "comparison": render_comparison(recipe.task, content, row),
        "source": describe_source(loaded, content),
        "plot": (artifact.path / "tradeoff.png").is_file(),
        "snippets": write_snippets(recipe.task, artifact, recipe.hub.repo or UNNAMED),
        "made": [stage.describe() for stage in list_stages(loaded, artifact)],
        "effort": describe_effort(content, artifact.stage),
        "stages": render_stages(content) if len(content["rows"]) > 2 else "",
        "sections": list(list_sections(content, artifact.path)),
        "conditions": render_sentences(content),
        "provenance": list_provenance(loaded, content, artifact),
        "recipe": code_block(shorten_places(loaded.document.text).rstrip("\n"), "yaml"),
        "overrides": [_hide_places(assignment) for assignment in loaded.document.overrides],
        "changes": describe_changes(content, row),
        "limits": _list_limits(loaded, artifact),
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


def _hide_places(assignment: str) -> str:
    """Shortens paths on this machine to their last part, in the value of `KEY=VALUE`."""
    key, _, value = assignment.partition("=")
    return f"{key}={shorten_places(value)}"
