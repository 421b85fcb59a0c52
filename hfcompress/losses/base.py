"""What a distillation loss is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from hfcompress.base.component import Component, Drawer, Strict
from hfcompress.base.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfcompress.model.observe import Observed

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Step:
    """What a loss sees of one training step.

    Attributes:
        student: The student's forward pass, with gradients.
        teacher: The teacher's on the same rows; None where no loss asks for one.
        mask: `(batch, length)`, true at real tokens.
        labels: `(batch,)` of a sequence head; `(batch, length)` of a token or mask head, -100 where nothing is asked;
            `(batch, 2)`, start and end, of a span head. None where the data has none.
        pairs: `(m, g)`: student layer `m` learns from teacher layer `g`, both from 1.
        task: The task: its `head`, and the loss that its labels give.
        dynamic: Whether `pairs` are only a start, and hidden states choose their own teacher layers.
    """

    student: Observed
    teacher: Observed | None
    mask: Tensor
    labels: Tensor | None
    pairs: Pairs
    task: Any
    dynamic: bool = False

    def taught(self) -> Observed:
        """The teacher's forward pass."""
        assert self.teacher is not None
        return self.teacher


class Ramp(Strict):
    """A weight that changes from the first step to the last."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    schedule: Literal["linear", "cosine"] = "linear"
    """`cosine` leaves the start and reaches the end slowly."""

    def at(self, progress: float) -> float:
        """The weight when a share `progress` of the steps is done."""
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share


class Loss(Component):
    """A term of the training objective."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it looks at besides logits: `hidden_states`, `queries`, `keys`, `values`."""
    needs_logits: ClassVar[bool] = False
    """Whether it looks at the logits."""
    needs_teacher: ClassVar[bool] = True
    mapped: ClassVar[bool] = True
    """Whether it compares layers pair by pair, as the layer map says; meaningful where it has `needs`."""

    weight: Annotated[float, Field(ge=0)] | Ramp = 1.0
    """The factor of this loss in the sum: a number, or `{start, end, schedule}` over the steps."""

    def weight_at(self, progress: float) -> float:
        """The factor when a share `progress` of the steps is done."""
        return self.weight.at(progress) if isinstance(self.weight, Ramp) else self.weight

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        """The layers of student and teacher that it looks at; the default is what the layer map pairs."""
        return pairs

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        """Why this loss cannot compare these two models; empty where it can."""
        return []

    def learned(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """A module that is trained with the student (a projection), or None."""
        return None

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        """The loss, a scalar without its weight."""
        raise NotImplementedError


LOSSES: Drawer[Loss] = Drawer("hfcompress.losses", Loss)
AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(LOSSES.parse)]


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The mean squared difference over the entries that `mask` keeps, in float32.

    Args:
        student, teacher: Equal shapes.
        mask: Broadcasts against them; 0 or 1.
    """
    weights = mask.to(student.device).expand_as(student).float()
    squares = (student.float() - teacher.float()).pow(2) * weights
    return squares.sum() / weights.sum().clamp(min=1)
