"""What a distillation loss is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Pairs, Step
from hfcompress.utils.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn


class LastLayer(Loss):
    """A loss on the student's last layer that has attention heads, and one of the teacher's."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "values"})
    mapped: ClassVar[bool] = False

    teacher_layer: int | None = Field(default=None, ge=1)
    """The teacher's layer, from 1; the last where nothing is said."""

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        return ((_last_with_heads(student), self.teacher_layer or _last_with_heads(teacher)),)

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        have, layer = len(teacher.layers), self.teacher_layer or 1
        if layer > have:
            return [f"{self.name} looks at the teacher's layer {layer}, and it has {have}; lower `teacher_layer`"]
        for whose, shape, number in (("student", student, 0), ("teacher", teacher, self.teacher_layer or 0)):
            heads = shape.layers[number - 1].heads if number else _last_with_heads(shape)
            if not heads:
                place = f"in layer {number}" if number else "left"
                return [f"{self.name} looks at attention, and the {whose} has no heads {place}; use hidden_states"]
        return []

    def compared(self, step: Step) -> tuple[int, int]:
        """The two layers, from 1."""
        return max(step.student.queries), self.teacher_layer or max(step.require_teacher().queries)


def _last_with_heads(shape: Shape) -> int:
    """The number of the last layer that has attention heads; 0 where none has."""
    return max((number for number, layer in enumerate(shape.layers, start=1) if layer.heads), default=0)


LOSSES: Registry[Loss] = Registry("hfcompress.distillation.losses", Loss)
AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(LOSSES.parse)]


TINYBERT_PROJECTION = "tinybert_projection"
"""What the losses with `tinybert_compat` learn together."""
_AT_ONCE = 2**25
NOTHING = -1e9
"""As good as minus infinity before a softmax, and without its NaNs."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean in float32 of the entries that `mask` (0 or 1, of the same shape) keeps; 0 where it keeps none."""
    weights = mask.float()
    return (values.float() * weights).sum() / weights.sum().clamp(min=1)


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """`(…, width)` tensors to the mean squared difference over the width, in float32."""
    return (student.float() - teacher.float()).pow(2).mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`(…, width)` tensors to `1 - cos`, in float32."""
    from torch.nn import functional as F

    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def projection(student: Shape, teacher: Shape, tinybert: bool = False) -> nn.Linear | None:
    """A learned map from the student's width to the teacher's, None where they are equal.

    Args:
        tinybert: As in TinyBERT's code: with a bias, and even where the widths are equal.
    """
    from torch import nn

    if student.hidden == teacher.hidden and not tinybert:
        return None
    return nn.Linear(student.hidden, teacher.hidden, bias=tinybert)


def in_float32(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: matrix products of float32 tensors stay in float32."""
    import torch

    return torch.autocast(like.device.type, enabled=False)


def by_rows(function: Callable[..., Tensor], entries: int, *tensors: Tensor) -> Tensor:
    """What `function` gives for all rows, asked for some at a time where it makes large tensors on the way.

    Those of a part are made anew in the backward pass, so that one part's alone are in memory.

    Args:
        function: From tensors to one whose first axis is rows, like theirs.
        entries: Of the largest tensor that it makes, for each row.
        *tensors: What it is given.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    size = max(1, _AT_ONCE // entries)
    if len(tensors[0]) <= size:
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def relation_distance(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor, squares: bool = False
) -> Tensor:
    """How far `R_S` is from `R_T`, with `R = softmax(X Yᵀ / √d)` over real tokens.

    Args:
        student, teacher: `X` and `Y`, `(batch, heads, length, d)`; `d` may differ.
        mask: `(batch, length)`.
        squares: `Σ (R_T - R_S)²` in place of `KL(R_T ‖ R_S)`.

    Returns:
        `(batch,)`: the sum over a row's real tokens (each a distribution), the mean over heads.
    """
    heads, length = student[0].shape[1:3]
    distance = _squared_relations if squares else _relation_divergence
    return by_rows(distance, heads * length**2, *student, *teacher, mask)


def _relation_divergence(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor, mask: Tensor) -> Tensor:
    from torch.nn import functional as F

    student, teacher = _log_relations(x_s, y_s, mask), _log_relations(x_t, y_t, mask)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return (divergence * mask.unsqueeze(1)).sum(-1).mean(1)


def _squared_relations(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor, mask: Tensor) -> Tensor:
    student, teacher = _log_relations(x_s, y_s, mask).exp(), _log_relations(x_t, y_t, mask).exp()
    return ((student - teacher).pow(2).sum(-1) * mask.unsqueeze(1)).sum(-1).mean(1)


def _log_relations(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    with in_float32(x):
        scores = x.float() @ y.float().transpose(-1, -2) / x.shape[-1] ** 0.5
    return scores.masked_fill(~mask[:, None, None], NOTHING).log_softmax(-1)


def attention_problems(loss: str, student: Shape, teacher: Shape, heads: set[int]) -> list[str]:
    """Why a loss that compares attention head by head cannot compare these two.

    Args:
        loss: Its name.
        student, teacher: The two.
        heads: How many heads the compared layers have.
    """
    for whose, shape in (("student", student), ("teacher", teacher)):
        if not shape.spec.plain_attention:
            return [
                f"{loss} needs attention scores that are Q Kᵀ / √d, and those of the {whose} ({shape.architecture}) "
                "know positions too; use minilm_v2 or hidden_states"
            ]
    if len(heads) > 1:
        counts = ", ".join(map(str, sorted(heads)))
        return [f"{loss} compares head by head, and there are layers with {counts} heads; use minilm_v2"]
    return []


def all_heads(student: Shape, teacher: Shape) -> set[int]:
    """How many heads the layers of the two have."""
    return {layer.heads for layer in (*student.layers, *teacher.layers)}
