"""The report as one HTML file that needs no network: table, plots, what changed, conditions."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.report import html_grid, html_parts
from hfcompress.report.conditions import find_metric, render_conditions, was_busy
from hfcompress.report.html_plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, draw_panels
from hfcompress.report.names import list_names, list_renamed
from hfcompress.report.sections import REPORTED
from hfcompress.report.verdicts import describe_verdicts
from hfcompress.utils.escape import printable
from hfcompress.utils.places import last_part

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")


def render_html(content: Mapping[str, Any]) -> str:
    """Renders a report as one HTML file.

    Every string of the report is escaped. The page's own policy forbids the browser to load anything and to run any
    script but the page's, which it knows by its hash.
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, finalize=_make_printable)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        **_collect_values(content),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        data=Markup(embed_json(content)),
    )


def embed_json(content: Mapping[str, Any]) -> str:
    """Writes JSON that can stand inside a `<script>`: no `<` in it, and null in place of NaN and infinity."""
    return json.dumps(_make_finite(content)).replace("<", "\\u003c")


def _make_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _make_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_make_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _make_printable(value: Any) -> Any:
    """Spells out the control characters of a text, which jinja then escapes."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _collect_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Collects the values that the template names."""
    rows, metric = content["rows"], find_metric(content)
    names = list_names(content)
    changes = html_parts.list_changes(content)
    lower = any(change["found"]["lower_is_better"] for change in changes)
    return {
        "name": content["name"],
        "metric": metric,
        "busy": was_busy(content),
        "is_run": html_parts.is_run(content),
        "headline": html_parts.make_headline(content),
        "table": html_parts.make_table(content),
        "renamed": list_renamed(content),
        "panels": draw_panels(content),
        "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        "waterfalls": html_parts.make_waterfalls(content),
        "grid": html_grid.make_latency_grid(content),
        "heat_maps": html_grid.make_heat_maps(content),
        "throughput": html_grid.make_throughput(content),
        "changes": changes,
        "direction": "better or worse" if lower else "worse or better",
        "verdicts": describe_verdicts(content),
        "confidence": [
            (name, row["confidence"]) for name, row in zip(names, rows, strict=True) if row.get("confidence")
        ],
        "stages": _list_stages(content),
        "conditions": _render_markdown(render_conditions(content)),
        "provenance": _list_provenance(content),
        "versions": content["environment"].get("versions", {}),
    }


def _list_stages(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lists what the stages found out: paragraphs of their own, kept units and sensitivity."""
    found = [
        {
            "name": stage,
            "paragraphs": _render_markdown("\n\n".join(cls.summarize(facts))),
            "kept": html_parts.make_kept_map(facts["kept"]) if "kept" in facts else [],
            "sensitivity": facts.get("sensitivity"),
            "maps": html_parts.make_sensitivity_maps(facts["sensitivity"]) if "sensitivity" in facts else [],
        }
        for cls in REPORTED
        for stage, facts in content.get(cls.report_key, {}).items()
    ]
    return [each for each in found if each["paragraphs"] or each["maps"]]


def _render_markdown(text: str) -> Markup:
    """Renders the Markdown that a stage writes for the card; HTML in it is escaped, and there are no links."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    return Markup(reader.disable(["link", "image", "autolink", "html_inline", "html_block"]).render(printable(text)))


def _list_provenance(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists what the figures belong to: data, recipe and weights, by their hashes."""
    task = content["task"]
    facts = {
        "data": last_part(str(task["dataset"])) if task.get("dataset") else "",
        "task": task.get("type", ""),
        "split": task["split"],
        "recipe": content.get("recipe", ""),
        "measurement": content.get("key", ""),
        "platform": content["environment"].get("platform", ""),
        "Python": content["environment"].get("python", ""),
        "schema": content.get("schema", ""),
    }
    facts |= {f"weights of {stage}": digest for stage, digest in content.get("weights", {}).items()}
    return [(name, str(value)) for name, value in facts.items() if value]
