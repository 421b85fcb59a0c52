"""Hidden-state distillation (TinyBERT): match the outputs of paired layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from hfcompress.distillation.losses.base import (
    TINYBERT_PROJECTION,
    cosine_distance,
    make_projection_layer,
    masked_mean,
    squared_difference,
)
from hfcompress.models.shape import Shape
from hfcompress.training.loss import Loss, Pairs, Step, Units

if TYPE_CHECKING:
    from torch import Tensor, nn


class HiddenStates(Loss):
    """`L = Σ_m D(H^S_m W_h, H^T_g(m))` over real tokens, `D` = MSE; `W_h` is learned if the widths differ.

    With `layer_map: dynamic`, each step uses the strictly increasing map `g` with the smallest sum, as in CoFi (Xia et
    al. 2022, arXiv:2204.00408, section 3.2). If the batch of a step is split, each part finds its own map.
    """

    source: ClassVar[str] = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351, eq. 8"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    distance: Literal["mse", "cosine"] = "mse"
    """The distance of two hidden states: mean squared error, or `cosine`, which is `1 - cos`."""
    projection: Literal["shared", "per_layer"] = "shared"
    """`shared`: one `W_h` for all layers, as in the paper; `per_layer`: one for each layer."""
    tinybert_compat: bool = False
    """Compute the loss as TinyBERT's code of 2019: padded tokens count, and one projection with a bias is shared with
    `embeddings`."""

    @model_validator(mode="after")
    def _check_compat(self) -> HiddenStates:
        if self.tinybert_compat and (self.distance, self.projection) != ("mse", "shared"):
            raise ValueError("`tinybert_compat` needs `distance: mse` and `projection: shared`")
        return self

    def map_problems(self, student: Shape, teacher: Shape, pairs: Pairs) -> list[str]:
        idle = {*range(1, len(student.layers) + 1)} - {m for m, _ in pairs}
        if self.projection == "shared" or student.hidden == teacher.hidden or not idle:
            return []
        return [
            f"nothing would train the projection of layer {min(idle)}, which the layer map does not name; "
            "name it, or say `projection: shared`"
        ]

    def make_projection(self, student: Shape, teacher: Shape) -> nn.Module | None:
        from torch import nn

        if self.projection == "shared" or student.hidden == teacher.hidden:
            return make_projection_layer(student, teacher, self.tinybert_compat)
        return nn.ModuleList(nn.Linear(student.hidden, teacher.hidden, bias=False) for _ in student.layers)

    def projection_name(self, key: str) -> str:
        return TINYBERT_PROJECTION if self.tinybert_compat else key

    def units(self, batch: Units) -> Tensor:
        return batch.places if self.tinybert_compat else batch.tokens

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        import torch

        student = [self._project(step.student.hidden_states[m], m, learned) for m, _ in step.pairs]
        teacher = step.require_teacher().hidden_states
        if step.dynamic:
            targets = self._nearest(student, torch.stack(teacher[1:]), step.mask)
        else:
            targets = [teacher[g] for _, g in step.pairs]
        parts = [self._distance(ours, theirs, step.mask) for ours, theirs in zip(student, targets, strict=True)]
        return torch.stack(parts).sum()

    def _project(self, states: Tensor, layer: int, learned: nn.Module | None) -> Tensor:
        if learned is None:
            return states
        return (learned[layer - 1] if self.projection == "per_layer" else learned)(states)  # type: ignore[index,operator]

    def _distance(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        values = (squared_difference if self.distance == "mse" else cosine_distance)(student, teacher)
        return values.mean() if self.tinybert_compat else masked_mean(values, mask)

    def _nearest(self, student: list[Tensor], teacher: Tensor, mask: Tensor) -> list[Tensor]:
        """Selects the aligned teacher states of each student layer from `(layers, batch, length, hidden)`."""
        import torch

        with torch.no_grad():
            costs = [torch.stack([self._distance(ours, theirs, mask) for theirs in teacher]) for ours in student]
            layers = align_layers(torch.stack(costs))
        return list(teacher[layers])


def align_layers(costs: Tensor) -> Tensor:
    """Chooses a column for each row, strictly increasing, with the smallest sum of costs, all on the device.

    Args:
        costs: `(rows, columns)`, with no more rows than columns.

    Returns:
        `(rows,)`: the columns, from 0.
    """
    import torch

    before, ends = torch.zeros_like(costs[0]), []
    for row in costs:
        least, column = torch.cummin(before + row, 0)
        ends.append(column)
        before = torch.nn.functional.pad(least[:-1], (1, 0), value=torch.inf)
    last = torch.full_like(ends[0][:1], costs.shape[1] - 1)
    chosen = []
    for column in reversed(ends):
        chosen.append(column.gather(0, last))
        last = (chosen[-1] - 1).clamp(min=0)  # below 0 only if costs are NaN
    return torch.cat(chosen[::-1])
