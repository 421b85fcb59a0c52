"""The facts, paragraphs and pictures of the stages, for the report and the card."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from hfcompress.context import Stage
from hfcompress.models.artifact import Artifact
from hfcompress.recipe.schema import AnyStage
from hfcompress.utils.figures import Figure, save
from hfcompress.utils.files import read_json

REPORTED: tuple[type[Stage], ...] = tuple(cls for cls in get_args(get_args(AnyStage)[0]) if cls.report_key)
"""The kinds of stages whose facts the report keeps."""


def collect_facts(artifacts: Sequence[Artifact]) -> dict[str, dict[str, Any]]:
    """Reads the facts that the report keeps from the stage.json of each model, by report key and stage name."""
    found: dict[str, dict[str, Any]] = {cls.report_key: {} for cls in REPORTED}
    for cls in REPORTED:
        for artifact in artifacts:
            record = (read_json(artifact.path / "stage.json") or {}) if artifact.kind == _find_kind(cls) else {}
            if facts := {key: record[key] for key in cls.reports if key in record}:
                found[cls.report_key][artifact.stage] = facts
    return found


def _find_kind(cls: type[Stage]) -> str:
    return str(cls.model_fields["kind"].default)


def list_figures(content: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Lists the pictures of all stages of a report: for each file name, the function that draws it into a path."""
    return {
        _name_file(stage, figure): partial(_draw, stage, figure)
        for cls in REPORTED
        for stage, facts in content.get(cls.report_key, {}).items()
        for figure in cls.figures(facts)
    }


def _name_file(stage: str, figure: Figure) -> str:
    return f"{stage}-{figure.name}.png"


def _draw(stage: str, figure: Figure, path: Path) -> None:
    save(figure.draw(), f"{stage}: {figure.title}", path)


def list_sections(content: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Lists the card's sections about the stages: each has a `heading`, and `parts` with one entry for each stage.

    Args:
        content: The report.
        folder: The directory of the card. A picture that is not there is left out.
    """
    for cls in REPORTED:
        parts = [_make_part(cls, stage, facts, folder) for stage, facts in content.get(cls.report_key, {}).items()]
        if parts:
            yield {"heading": cls.report_heading, "parts": parts}


def _make_part(cls: type[Stage], stage: str, facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    pictures = [
        {"name": figure.name, "file": _name_file(stage, figure), "caption": figure.caption}
        for figure in cls.figures(facts)
        if (folder / _name_file(stage, figure)).is_file()
    ]
    return {"stage": stage, "paragraphs": cls.summarize(facts), "pictures": pictures}
