"""The registry of distillation losses, and functions that they share: relations between tokens, masked means."""

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
    """A loss that compares the student's last layer with attention heads to one layer of the teacher."""

    needs: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "values"})
    uses_layer_map: ClassVar[bool] = False

    teacher_layer: int | None = Field(default=None, ge=1)
    """The teacher's layer, from 1; by default the last one with attention heads."""

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        return ((_last_with_heads(student), self.teacher_layer or _last_with_heads(teacher)),)

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        have, layer = len(teacher.layers), self.teacher_layer or 1
        if layer > have:
            return [f"{self.name} uses the teacher's layer {layer}, and it has only {have}; lower `teacher_layer`"]
        for whose, shape, number in (("student", student, 0), ("teacher", teacher, self.teacher_layer or 0)):
            heads = shape.layers[number - 1].heads if number else _last_with_heads(shape)
            if not heads:
                place = f"in layer {number}" if number else "left"
                return [f"{self.name} uses attention, and the {whose} has no heads {place}; use hidden_states"]
        return []

    def pair_of(self, step: Step) -> tuple[int, int]:
        """Returns the student layer and the teacher layer to compare, from 1."""
        return max(step.student.queries), self.teacher_layer or max(step.require_teacher().queries)


def _last_with_heads(shape: Shape) -> int:
    """Finds the last layer with attention heads, from 1; 0 if there is none."""
    return max((number for number, layer in enumerate(shape.layers, start=1) if layer.heads), default=0)


LOSSES: Registry[Loss] = Registry("hfcompress.distillation.losses", Loss)
AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(LOSSES.parse)]


TINYBERT_PROJECTION = "tinybert_projection"
"""The name of the projection that the losses with `tinybert_compat` share."""
_AT_ONCE = 2**25
"""The most entries of a tensor in one part of `by_rows`."""
NOTHING = -1e9
"""A value for masked entries before a softmax; minus infinity could give NaN."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Computes the mean of the entries where `mask` is 1, in float32; 0 if it is 1 nowhere."""
    weights = mask.float()
    return (values.float() * weights).sum() / weights.sum().clamp(min=1)


def squared_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the mean squared difference of `(…, width)` tensors over the width, in float32."""
    return (student.float() - teacher.float()).pow(2).mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes `1 - cos` of `(…, width)` tensors, in float32."""
    from torch.nn import functional as F

    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def make_projection_layer(student: Shape, teacher: Shape, tinybert: bool = False) -> nn.Linear | None:
    """Makes a linear map from the student's width to the teacher's; None if they are equal.

    Args:
        tinybert: True for a map as in TinyBERT's code: with a bias, and also for equal widths.
    """
    from torch import nn

    if student.hidden == teacher.hidden and not tinybert:
        return None
    return nn.Linear(student.hidden, teacher.hidden, bias=tinybert)


def in_float32(like: Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off, so that matrix products of float32 tensors stay in float32."""
    import torch

    return torch.autocast(like.device.type, enabled=False)


def by_rows(function: Callable[..., Tensor], entries: int, *tensors: Tensor) -> Tensor:
    """Applies a function that makes large tensors to some rows at a time.

    The backward pass makes these tensors again, part by part, so only those of one part are in memory.

    Args:
        function: A function whose arguments and result have rows as their first axis.
        entries: Entries of the largest tensor that it makes, for each row.
        *tensors: Its arguments.
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
    """Computes the distance of `R_S` from `R_T`, with `R = softmax(X Yᵀ / √d)` over real tokens.

    Args:
        student, teacher: `X` and `Y`, `(batch, heads, length, d)`; `d` may differ.
        mask: `(batch, length)`.
        squares: True for `Σ (R_T - R_S)²` instead of `KL(R_T ‖ R_S)`.

    Returns:
        `(batch,)`: the sum over the real tokens of a row, each with a distribution, and the mean over heads.
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
    """Lists the reasons why a loss that compares attention head by head cannot compare two models.

    Args:
        loss: The name of the loss.
        student, teacher: The shapes of the models.
        heads: The different numbers of heads in the compared layers.
    """
    for whose, shape in (("student", student), ("teacher", teacher)):
        if not shape.spec.plain_attention:
            return [
                f"{loss} needs attention scores that are Q Kᵀ / √d, and those of the {whose} ({shape.architecture}) "
                "also depend on positions; use minilm_v2 or hidden_states"
            ]
    if len(heads) > 1:
        counts = ", ".join(map(str, sorted(heads)))
        return [f"{loss} compares head by head, and there are layers with {counts} heads; use minilm_v2"]
    return []


def all_heads(student: Shape, teacher: Shape) -> set[int]:
    """Lists the different numbers of heads in the layers of both models."""
    return {layer.heads for layer in (*student.layers, *teacher.layers)}
