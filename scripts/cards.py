"""Renders the cards in model_cards/ again, each from the report and the recipe beside it: `make cards`."""

from __future__ import annotations

import sys
from pathlib import Path

from hfcompress.models.artifact import Artifact
from hfcompress.models.weights import GRAPH_FILES
from hfcompress.recipe.loader import parse, validate
from hfcompress.report import card, report

CARDS = Path(__file__).parents[1] / "model_cards"
RUNTIMES = {"onnxruntime": "onnx"}
"""Runtimes of a report by their name in a model directory, where the two differ."""


def render(folder: Path) -> str:
    """Renders the card of a directory that holds the report.json and the recipe.yaml of a run."""
    content = report.read(folder)
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    row = content["rows"][-1]
    timed = row["latency"][0]
    runtime = RUNTIMES.get(timed["runtime"], timed["runtime"])
    dtype = timed.get("stored", timed["dtype"])
    graph = GRAPH_FILES[dtype] if runtime == "onnx" else ""
    model = Artifact(folder, row["stage"], row["kind"], None, runtime, dtype, graph)
    return card.render(validate(parse(text, folder / "recipe.yaml")), content, model)


def list_folders() -> list[Path]:
    """Lists the directories whose cards can be rendered: those of runs that kept their report."""
    return sorted(path.parent for path in CARDS.glob("*/report.json"))


def main() -> None:
    """Writes the cards and their figures."""
    for folder in list_folders():
        for name, draw in report.list_pictures(report.read(folder)).items():
            draw(folder / name)
        (folder / "README.md").write_text(render(folder), encoding="utf-8")
        sys.stdout.write(f"{folder / 'README.md'}\n")


if __name__ == "__main__":
    main()
