"""Reads and writes the report of a run or of a comparison: JSON, CSV, Markdown and pictures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hfcompress.report.html import render_html
from hfcompress.report.plots import draw_tradeoff
from hfcompress.report.sections import list_figures
from hfcompress.report.tables import render_csv, render_markdown
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import write_text

SCHEMA = 2
"""The version of report.json: 2 has `against_source` in each row but the first, and `labels`."""


def read(directory: Path) -> dict[str, Any]:
    """Reads the report.json of a run directory.

    Raises:
        HfcompressError: if there is none, or it is not JSON.
    """
    path = directory / "report.json"
    if not path.is_file():
        raise HfcompressError(f"{directory} holds no report.json", "`hfcompress run RECIPE` writes one")
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """Reads a report.json.

    Raises:
        HfcompressError: if it cannot be read, or is no report.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        fix = "delete it; the same `hfcompress run` measures again"
        raise HfcompressError(f"{path} is not JSON: {error}", fix) from None
    if not isinstance(content, dict) or not content.get("rows"):
        raise HfcompressError(f"{path} is no report", "name a run directory, or its report.json")
    return content


def write(content: Mapping[str, Any], directory: Path) -> None:
    """Writes report.json, .csv, .md and .html, and the pictures in plots/ if matplotlib is installed."""
    files = {
        "report.json": json.dumps(content, indent=2) + "\n",
        "report.csv": render_csv(content),
        "report.md": render_markdown(content),
        "report.html": render_html(content),
    }
    for name, text in files.items():
        write_text(directory / name, text)
    if importlib.util.find_spec("matplotlib") is not None:
        (directory / "plots").mkdir(exist_ok=True)
        for name, draw in list_pictures(content).items():
            draw(directory / "plots" / name)


def list_pictures(content: Mapping[str, Any]) -> dict[str, Callable[[Path], None]]:
    """Lists the pictures of a report: for each file name, the function that draws the picture into a path."""
    return {"tradeoff.png": partial(draw_tradeoff, content), **list_figures(content)}
