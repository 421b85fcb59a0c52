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
    """One line of the plan.

    Attributes:
        stage: `source`, or the stage's directory name.
        shape: The shape after it.
        steps: Optimizer steps on one process; None if only reading the data can tell.
    """

    stage: str
    shape: Shape
    steps: int | None


def plan(loaded: Loaded) -> list[PlannedRow]:
    """Plans the model and what each stage makes of it.

    Raises:
        HfcompressError: with everything that cannot work.
    """
    shapes = check(loaded, weights=False)
    recipe = loaded.recipe
    planned = [PlannedRow("model", _as_stored(shapes[0], stored_dtype(recipe.model)), 0)]
    for name, stage, shape in zip(recipe.stage_names(), recipe.stages, shapes[1:], strict=True):
        planned.append(PlannedRow(name, shape, stage.steps(stage.task_of(recipe.task))))
    return planned


def _as_stored(shape: Shape, dtype: str) -> Shape:
    """The shape with the bits of the checkpoint; stages work in float32, so their models have 32 until quantized."""
    return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16) if dtype in HALVES else shape


def layers_text(shape: Shape) -> tuple[str, str, str]:
    """Writes layers, heads and FFN widths for a table.

    They are totals if a global ranking decides where to cut, and approximate (`~`) if a budget decides how much.
    """
    heads, ffn = [x.heads for x in shape.layers], [x.ffn for x in shape.layers]
    if not shape.even:
        about = "~" if shape.estimated else ""
        return str(len(heads)), f"{about}{sum(heads)} in all", f"{about}{sum(ffn)} in all"
    return str(len(heads)), _span(heads), _span(ffn)


def _span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"
