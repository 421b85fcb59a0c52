"""How a model came about: files of each stage, versions, hashes and hardware, for the report and the card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.weights import weight_files
from hfcompress.report.conditions import describe_processor
from hfcompress.report.hub_metadata import find_dataset, list_stage_names
from hfcompress.utils.escape import Markdown, code, markdown
from hfcompress.utils.files import read_json
from hfcompress.utils.places import last_part
from hfcompress.utils.wording import count, format_duration

if TYPE_CHECKING:
    from hfcompress.models.artifact import Artifact
    from hfcompress.recipe.loader import Loaded

HISTORY = "history"
"""The key of the report with the hashes of the weight files of each stage."""


def collect_history(directory: Path, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads from each stage.json of a run the SHA-256 of its weight files.

    Args:
        directory: The run directory.
        stages: The names of the stages; one that has not run is left out.
    """
    found = {}
    for name in stages:
        if record := read_json(directory / name / "stage.json"):
            hashes = record.get("files", {})
            weights = [file for file in weight_files(directory / name) if file in hashes]
            found[name] = {"sha256": {file: hashes[file] for file in weights}}
    return {HISTORY: found}


def list_provenance(loaded: Loaded, content: Mapping[str, Any], artifact: Artifact) -> list[tuple[str, Markdown]]:
    """Lists what identifies a model and its making, each with a name; what a report does not hold is left out."""
    history, stages = content.get(HISTORY, {}), list_stage_names(loaded, artifact)
    rows: list[tuple[str, Markdown]] = []
    rows += [("weights", _join_lines(_list_hashes(history, stages, artifact.stage)))]
    rows += [("source", _describe_source(content))]
    rows += [("data", _describe_data(loaded, content))]
    rows += [("time", _describe_time(content))]
    rows += [("hardware", _describe_hardware(content))]
    rows += [("versions", _describe_versions(content["environment"]))]
    return [(name, value) for name, value in rows if value]


def _list_hashes(history: Mapping[str, Any], stages: Sequence[str], stage: str) -> Iterator[str]:
    name = stage if stage in history else stages[-1] if stages else ""
    for file, digest in history.get(name, {}).get("sha256", {}).items():
        yield f"{code(file)}, SHA-256 {code(digest)}"


def _describe_source(content: Mapping[str, Any]) -> Markdown:
    digest = content.get("weights", {}).get("source")
    return Markdown(f"weights and config {code(digest)} (hfcompress's hash)" if digest else "")


def _describe_data(loaded: Loaded, content: Mapping[str, Any]) -> Markdown:
    task = loaded.recipe.task
    revision = content.get("revisions", {}).get(f"datasets/{task.dataset}")
    parts = [
        code(find_dataset(loaded) or last_part(task.dataset)) + (f" {code(task.config)}" if task.config else ""),
        f"revision {code(revision)}" if revision else "",
        f"judged rows {code(content['data_hash'])} (hfcompress's hash)" if "data_hash" in content else "",
    ]
    return Markdown(", ".join(filter(None, parts)))


def _describe_time(content: Mapping[str, Any]) -> Markdown:
    """Says how long measuring took; how long the stages took, `describe_effort` says."""
    if not content.get("seconds"):
        return Markdown("")
    return markdown(f"{format_duration(content['seconds'])} to measure {count(len(content['rows']), 'model')}")


def _describe_hardware(content: Mapping[str, Any]) -> Markdown:
    found = content["environment"]
    parts = (found.get("accelerator"), describe_processor(found), found.get("platform"))
    return markdown(", ".join(filter(None, parts)))


def _describe_versions(environment: Mapping[str, Any]) -> Markdown:
    versions = {"Python": environment.get("python"), **environment.get("versions", {})}
    return markdown(", ".join(f"{name} {version}" for name, version in versions.items() if version))


def _join_lines(lines: Iterator[str]) -> Markdown:
    return Markdown("<br>".join(lines))
