"""A student's first weights, taken from the model it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.base.shape import Shape, shape_of
from hfcompress.model.family import Family, family_of
from hfcompress.model.surgery import empty_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def build_student(
    origin: PreTrainedModel, shape: Shape, layer_map: list[int], random: bool = False
) -> tuple[PreTrainedModel, dict[str, str]]:
    """A model of `shape` that starts from `origin`'s weights.

    A tensor of equal shape is copied. A larger one is truncated: the first rows and columns, and inside a query, key,
    value or attention-output matrix the first dimensions of each of the first heads, so that a head stays a head.

    Args:
        origin: The model that the weights come from.
        shape: The student's shape, of the same architecture.
        layer_map: For each student layer, the origin's layer (from 0) that it starts from.
        random: Leave every weight at its random start.

    Returns:
        The student in train mode, and for each of `embeddings`, `layer N` (from 1) and `head` where it came from.
    """
    import torch

    student = empty_model(type(origin).__name__, shape, origin.config)
    if random:
        return student.train(), {"all": "random"}
    source, target, family = origin.state_dict(), student.state_dict(), family_of(origin)
    old = shape_of(origin.config.to_dict())
    report: dict[str, set[str]] = {}
    with torch.no_grad():
        for name, tensor in target.items():
            part, origin_name = _origin_of(name, layer_map, family)
            report.setdefault(part, set()).add(_fill(tensor, source.get(origin_name), origin_name, family, old, shape))
    return student.train(), {part: _summary(part, kinds, layer_map) for part, kinds in report.items()}


def _origin_of(name: str, layer_map: list[int], family: Family) -> tuple[str, str]:
    before, separator, after = name.partition(f"{family.layers}.")
    if not separator:
        return ("embeddings" if "embeddings." in name else "head"), name
    index, _, rest = after.partition(".")
    return f"layer {int(index) + 1}", f"{before}{separator}{layer_map[int(index)]}.{rest}"


def _fill(tensor: Tensor, source: Tensor | None, name: str, family: Family, old: Shape, new: Shape) -> str:
    if source is None or any(have < want for have, want in zip(source.shape, tensor.shape, strict=True)):
        return "random"
    whole = source.shape == tensor.shape
    axes = {family.query: 0, family.key: 0, family.value: 0, family.attention_output: 1}
    axis = next((axis for path, axis in axes.items() if f".{path}." in name), source.dim())
    of_other_heads = axis < source.dim() and old.head_dim != new.head_dim
    if of_other_heads:
        source = _first_of_each_head(source, axis, old.head_dim, new.head_dim, tensor.shape[axis])
    tensor.copy_(source[tuple(slice(0, size) for size in tensor.shape)])
    if not whole:
        return "truncated"
    return "regrouped into other heads" if of_other_heads else "copied"


def _first_of_each_head(source: Tensor, axis: int, old: int, new: int, wanted: int) -> Tensor:
    if new > old or source.shape[axis] // old * new < wanted:
        return source
    return source.unflatten(axis, (-1, old)).narrow(axis + 1, 0, new).flatten(axis, axis + 1)


def _summary(part: str, kinds: set[str], layer_map: list[int]) -> str:
    how = " and ".join(sorted(kinds))
    if not part.startswith("layer ") or kinds == {"random"}:
        return how
    return f"{how} from layer {layer_map[int(part.removeprefix('layer ')) - 1] + 1}"
