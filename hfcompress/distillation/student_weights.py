"""Builds a student, and copies its first weights from the model that it comes from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from hfcompress.distillation.width_importance import Importance, Narrowing
from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.shape import Shape, shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.models.weight_axes import Axis, axes_of, part_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def build_student(
    origin: PreTrainedModel,
    shape: Shape,
    layers: Sequence[int],
    init: Literal["copy", "random"] = "copy",
    importance: Importance | None = None,
    fresh_head: bool = False,
) -> tuple[PreTrainedModel, dict[str, str]]:
    """Builds a model of `shape` with weights from `origin`.

    A tensor of equal shape is copied. A larger one is cut: all layers keep the same dimensions of the residual stream;
    a head keeps the same dimensions for query and key, and for value and output; an FFN keeps the same neurons in both
    of its layers. A tensor that is smaller in the origin stays random.

    Args:
        origin: The model that the weights come from.
        shape: The student's shape, of the same architecture.
        layers: For each student layer, the origin's layer (from 0) to copy.
        init: `random` copies nothing.
        importance: Decides which dimensions, heads and neurons a narrower student keeps; by default the first ones.
        fresh_head: True to leave the task head random, because the origin's was not trained either.

    Returns:
        The student in train mode, and the origin of the weights of `embeddings`, each `layer N` (from 1) and `head`.
    """
    import torch

    old = shape_of(origin.config.to_dict())
    config = copy.deepcopy(origin.config)
    if shape.labels != old.labels:
        config.num_labels = shape.labels
    student = empty_model(type(origin).__name__, shape, config)
    if init == "random":
        return student.train(), {"all": "random"}
    source, axes = origin.state_dict(), axes_of(student)
    narrowing = Narrowing(old, shape, importance, same_heads=any(("heads",) in kinds for kinds in axes.values()))
    last = len(layers_of(origin)) - 1
    report: dict[str, set[str]] = {}
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            part = part_of(name, student)
            layer = min(layers[_number(part)], last) if part.startswith("layer ") else 0
            given = None if part == "head" and fresh_head else source.get(_renumber(name, student, layer))
            report.setdefault(part, set()).add(_fill(tensor, given, axes[name], layer, narrowing))
    return student.train(), {part: _summary(part, kinds, layers) for part, kinds in report.items()}


def _number(part: str) -> int:
    return int(part.removeprefix("layer ")) - 1


def _renumber(name: str, model: PreTrainedModel, layer: int) -> str:
    before, separator, after = name.partition(f"{spec_of(model).modules.layers}.")
    return f"{before}{separator}{layer}.{after.partition('.')[2]}" if separator else name


def _fill(tensor: Tensor, source: Tensor | None, axes: tuple[Axis, ...], layer: int, narrowing: Narrowing) -> str:
    """Fills a weight of the student, and returns the way in which it did."""
    if source is None or source.dim() != tensor.dim():
        return "random"
    sizes = list(zip(axes, source.shape, tensor.shape, strict=True))
    kept = [narrowing.index(axis, layer, have, want) for axis, have, want in sizes]
    for axis, index in enumerate(kept):
        if index is None:
            return "random"
        source = source.index_select(axis, index.to(source.device))
    tensor.copy_(source)
    cut = {axis for axis, have, want in sizes if have != want}
    if cut:
        return "selected by activation" if narrowing.importance and cut != {("positions",)} else "truncated"
    regrouped = narrowing.old.head_dim != narrowing.new.head_dim
    return "regrouped into other heads" if regrouped and _belongs_to_heads(axes) else "copied"


def _belongs_to_heads(axes: tuple[Axis, ...]) -> bool:
    return any(part in ("scores", "values") for axis in axes for part in axis)


def _summary(part: str, kinds: set[str], layers: Sequence[int]) -> str:
    how = " and ".join(sorted(kinds))
    if not part.startswith("layer ") or kinds == {"random"}:
        return how
    return f"{how} from layer {layers[_number(part)] + 1}"
