"""Times the models of a finished run again: `hfcompress report --measure`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import model_directory
from hfcompress.measure.measure import time_again
from hfcompress.models.artifact import Artifact, open_artifact, weights_hash
from hfcompress.recipe.loader import Loaded
from hfcompress.report import conditions, report
from hfcompress.report.costs import add_costs
from hfcompress.run.directory import exclusive, open_finished
from hfcompress.run.finish import write_card
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    pass


def measure_again(directory: Path) -> dict[str, Any]:
    """Times the models of a finished run again, and writes report, figures and card; all else in them stays.

    Times of a busy machine do not replace those of a quiet one.

    Returns:
        The report.

    Raises:
        HfcompressError: if the directory is no finished run, or its models are not those that were measured.
    """
    open_finished(directory)
    with exclusive(directory):
        return _measure_again(directory)


def _measure_again(directory: Path) -> dict[str, Any]:
    loaded, content = open_finished(directory)
    final = directory / "final"
    if not (final / "config.json").is_file():
        raise HfcompressError(f"{final} holds no model", "the same `hfcompress run` writes it again")
    artifacts = open_measured(loaded, directory, content)
    recipe = loaded.recipe
    timed = time_again(artifacts, recipe.task, recipe.measure, recipe.seed, content, log.info)
    if conditions.was_busy(timed) and content.get("machine", {}).get("busy") is False:
        why = "; ".join(timed["machine"]["why"])
        log.info(f"the machine is busy now ({why}): the report keeps the times of before, when it was quiet")
        return content
    content = add_costs(timed, recipe.measure)
    report.write(content, directory)
    write_card(loaded, directory, open_artifact(final, artifacts[-1].stage, artifacts[-1].kind), content)
    return content


def open_measured(loaded: Loaded, directory: Path, content: dict[str, Any], only: str | None = None) -> list[Artifact]:
    """Opens the models of a report's rows, in order.

    Args:
        loaded: The recipe.
        directory: The run directory.
        content: The report.
        only: The row to open; by default all of them.

    Raises:
        HfcompressError: if a model is missing, or is not the one that was measured.
    """
    recipe = loaded.recipe
    tuned = [n for n, stage in zip(recipe.stage_names(), recipe.stages, strict=True) if not stage.compresses]
    artifacts = []
    for row in content["rows"]:
        if only not in (None, row["stage"]):
            continue
        if row["stage"] == "source":
            place = directory / tuned[-1] if tuned else model_directory(recipe.model)
        else:
            place = directory / row["stage"]
        if not (place / "config.json").is_file():
            raise HfcompressError(f"{place} holds no model", "the same `hfcompress run` makes it again")
        made = open_artifact(place, row["stage"], row["kind"])
        # Reports of earlier versions have only the size of the weights.
        known = content["weights"][made.stage] if "weights" in content else row["disk_bytes"]
        if known != (weights_hash(place) if "weights" in content else made.disk_bytes):
            raise HfcompressError(
                f"{place} is not the model that the report is about", "the same `hfcompress run` measures it again"
            )
        artifacts.append(made)
    return artifacts
