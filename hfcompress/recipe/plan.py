"""Plans a recipe: exact shapes, parameters and MACs of each stage, without any weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hfcompress.data.source import stored_dtype
from hfcompress.models.artifact import HALVES
from hfcompress.models.shape import Shape
from hfcompress.recipe.loader import Loaded
from hfcompress.recipe.validate import check


@dataclass(frozen=True)
class PlannedRow:
    """A row of the plan.

    Attributes:
        stage: `model`, or the name of the stage's directory.
        shape: The shape after the stage.
        steps: The optimizer steps on one process; None if the number of rows is not known yet.
    """

    stage: str
    shape: Shape
    steps: int | None


def plan(loaded: Loaded) -> list[PlannedRow]:
    """Plans the shape of the model and the shape after each stage.

    Raises:
        HfcompressError: with all problems at once.
    """
    shapes = check(loaded, weights=False)
    recipe = loaded.recipe
    planned = [PlannedRow("model", _store(shapes[0], stored_dtype(recipe.model)), 0)]
    for name, stage, shape in zip(recipe.stage_names(), recipe.stages, shapes[1:], strict=True):
        planned.append(PlannedRow(name, shape, stage.steps(stage.task_of(recipe.task))))
    return planned


def _store(shape: Shape, dtype: str) -> Shape:
    """Sets the bits of the checkpoint; stages work in float32, so their models have 32 bits until quantize."""
    return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16) if dtype in HALVES else shape


def format_layers(shape: Shape) -> tuple[str, str, str]:
    """Formats the number of layers, heads and FFN neurons for a table.

    Heads and neurons are totals if a ranking over all layers decides where to cut, and approximate (`~`) if a budget
    decides how much.
    """
    heads, ffn = [x.heads for x in shape.layers], [x.ffn for x in shape.layers]
    if not shape.even:
        about = "~" if shape.estimated else ""
        return str(len(heads)), f"{about}{sum(heads)} in all", f"{about}{sum(ffn)} in all"
    return str(len(heads)), _format_range(heads), _format_range(ffn)


def _format_range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"
