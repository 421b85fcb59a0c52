"""Renders the cards in model_cards/ again, each from the report and the recipe beside it: `make cards`.

`python scripts/cards.py RUN NAME` first copies these from a run directory into model_cards/NAME.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from hfcompress.models.artifact import Artifact
from hfcompress.models.weights import GRAPH_FILES
from hfcompress.recipe.loader import Loaded, load
from hfcompress.report import card, report
from hfcompress.report.provenance import HISTORY
from hfcompress.run.directory import open_finished
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.places import is_place, last_part, shorten_places

CARDS = Path(__file__).parents[1] / "model_cards"
RUNTIMES = {"onnxruntime": "onnx"}
"""Runtimes of a report by their name in a model directory, where the two differ."""
OVERRIDES = "overrides.json"
"""The file with the `--set` assignments of a run, if it had any."""


def render(folder: Path) -> str:
    """Renders the card of a directory that holds the report.json and the recipe.yaml of a run."""
    content, kept = report.read(folder), folder / OVERRIDES
    overrides = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    return card.render(load(folder / "recipe.yaml", overrides), content, make_artifact(folder, content))


def make_artifact(folder: Path, content: dict[str, Any]) -> Artifact:
    """Makes the artifact of the last model of a report, whose weights are not there."""
    row = content["rows"][-1]
    timed = row["latency"][0]
    runtime = RUNTIMES.get(timed["runtime"], timed["runtime"])
    dtype = timed.get("stored", timed["dtype"])
    files = content.get(HISTORY, {}).get(row["stage"], {}).get("sha256", {})
    usual = GRAPH_FILES[dtype] if runtime == "onnx" else ""
    graph = next((name for name in files if name.endswith((".onnx", ".xml"))), usual)
    return Artifact(folder, row["stage"], row["kind"], None, runtime, dtype, graph)


def list_folders() -> list[Path]:
    """Lists the directories whose cards can be rendered: those of runs that kept their report."""
    return sorted(path.parent for path in CARDS.glob("*/report.json"))


def copy_run(run: Path, folder: Path) -> None:
    """Copies the report, without the texts of the data, and what else a card is rendered from.

    Raises:
        HfcompressError: if the directory is no finished run.
    """
    loaded, content = open_finished(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text, *overrides = (_shorten(each, loaded) for each in (loaded.document.text, *loaded.document.overrides))
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    if overrides:
        (folder / OVERRIDES).write_text(json.dumps(overrides, indent=2) + "\n", encoding="utf-8")
    if (final := run / "final" / "config.json").is_file():  # it tells which code loads the model
        shutil.copyfile(final, folder / "config.json")
    (folder / "report.json").write_text(json.dumps(leave_out_texts(content), indent=2) + "\n", encoding="utf-8")


def _shorten(text: str, loaded: Loaded) -> str:
    """Shortens the paths of a recipe; the model and the data stay recognizable as local ones."""
    for place in (loaded.recipe.model, loaded.recipe.task.dataset):
        if is_place(place):
            text = text.replace(place, f"./{last_part(place)}")
    return shorten_places(text)


def leave_out_texts(content: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the flipped rows, which show texts of the data."""
    rows = []
    for row in content["rows"]:
        found = row.get("against_source")
        kept = {"against_source": {k: v for k, v in found.items() if k != "flips"}} if found else {}
        rows.append({**row, **kept})
    return {**content, "rows": rows}


def write(folder: Path) -> None:
    """Writes a card and its figures."""
    for name, draw in report.list_pictures(report.read(folder)).items():
        draw(folder / name)
    (folder / "README.md").write_text(render(folder), encoding="utf-8")
    sys.stdout.write(f"{folder / 'README.md'}\n")


def main(arguments: list[str] | None = None) -> None:
    """Writes the cards and their figures, or that of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the directory in model_cards/, which is replaced")
    options = parser.parse_args(arguments)
    if options.run is None:
        folders = list_folders()
    elif options.name is None or Path(options.name).name != options.name:
        parser.error("name the directory in model_cards/ too: cards.py RUN NAME")
    else:
        folders = [CARDS / options.name]
        try:
            copy_run(options.run, folders[0])
        except HfcompressError as error:
            parser.error(str(error))
    for folder in folders:
        write(folder)


if __name__ == "__main__":
    main()
