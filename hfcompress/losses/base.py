"""What a distillation loss is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from hfcompress.base.component import Component, Drawer
from hfcompress.base.shape import Shape

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfcompress.model.observe import Observed


@dataclass(frozen=True)
class Step:
    """What a loss sees of one training step.

    Attributes:
        student: The student's forward pass, with gradients.
        teacher: The teacher's on the same rows; None where no loss asks for one.
        mask: `(batch, length)`, true at real tokens.
        labels: One a row; None where the data has none.
        layer_map: `layer_map[m]` is the teacher layer (from 1) that student layer `m + 1` learns from.
        task: The task, for the loss that its labels give.
    """

    student: Observed
    teacher: Observed | None
    mask: Tensor
    labels: Tensor | None
    layer_map: tuple[int, ...]
    task: Any

    def taught(self) -> Observed:
        """The teacher's forward pass."""
        assert self.teacher is not None
        return self.teacher


class Loss(Component):
    """A term of the training objective."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it looks at besides logits: `hidden_states`, `queries_keys`."""
    needs_teacher: ClassVar[bool] = True

    weight: float = Field(default=1.0, ge=0)
    """The factor of this loss in the sum."""

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
