"""The contract of a training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from hfcompress.models.shape import Shape
from hfcompress.utils.errors import Problem
from hfcompress.utils.registry import Component
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from torch import Tensor, nn

    from hfcompress.data.task import Task
    from hfcompress.models.forward import Observed


TAUGHT = "taught"
"""What begins the name of a tensor that travels with a batch for a teacher: `taught.0.logits`, `taught.1.input_ids`."""
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
        state: What the loss was told of the train rows by its `state_of`.
    """

    student: Observed
    teacher: Observed | None
    mask: Tensor
    labels: Tensor | None
    pairs: Pairs
    task: Task
    dynamic: bool = False
    state: Tensor | None = None

    def taught(self) -> Observed:
        """The teacher's forward pass."""
        assert self.teacher is not None
        return self.teacher


@dataclass(frozen=True)
class Units:
    """What of a batch a loss may be the mean over; each is a scalar tensor.

    Attributes:
        mask: `(batch, length)`, true at real tokens.
        labels: As in `Step`.
        task: The task.
        state: As in `Step`.
    """

    mask: Tensor
    labels: Tensor | None
    task: Task
    state: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The rows."""
        import torch

        return torch.tensor(float(len(self.mask)), device=self.mask.device)

    @property
    def tokens(self) -> Tensor:
        """The real tokens."""
        return self.mask.sum().float()

    @property
    def token_pairs(self) -> Tensor:
        """The pairs of real tokens of a row."""
        return self.mask.sum(1).float().pow(2).sum()

    @property
    def places(self) -> Tensor:
        """Tokens and padding."""
        return self.rows * self.mask.shape[1]

    @property
    def labelled(self) -> Tensor:
        """The tokens that have a label."""
        assert self.labels is not None
        return (self.labels != -100).sum().float()


class Ramp(StrictModel):
    """A weight that changes from the first step to the last."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    schedule: Literal["linear", "cosine"] = "linear"
    """`cosine` leaves the start and reaches the end slowly."""

    def at(self, progress: float) -> float:
        """The weight when a share `progress` of the steps is done."""
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share


def _number_or_ramp(value: Any) -> Any:
    """Tells what is wrong with one of the two things that a weight can be, not with both."""
    if isinstance(value, (dict, Ramp)):
        return Ramp.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"a weight is a number of 0 or more, or a mapping with start and end, not {value!r}")
    return float(value)


Weight = Annotated[float | Ramp, BeforeValidator(_number_or_ramp)]


class Loss(Component):
    """A term of the training objective."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it looks at besides logits: `hidden_states`, `queries`, `keys`, `values`."""
    needs_logits: ClassVar[bool] = False
    """Whether it looks at the logits."""
    needs_teacher: ClassVar[bool] = True
    mapped: ClassVar[bool] = True
    """Whether it compares layers pair by pair, as the layer map says; meaningful where it has `needs`."""

    first_token_only: ClassVar[bool] = False
    """Whether the first token's hidden states are all it looks at of them."""

    weight: Weight = 1.0
    """The factor of this loss in the sum: a number, or `{start, end, schedule}` over the steps."""

    def weight_at(self, progress: float) -> float:
        """The factor when a share `progress` of the steps is done."""
        return self.weight.at(progress) if isinstance(self.weight, Ramp) else self.weight

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        """The layers whose insides it looks at: by default what the layer map pairs, none where it is not mapped."""
        return pairs if self.mapped else ()

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        """Why this loss cannot compare these two models; empty where it can."""
        return []

    def map_problems(self, student: Shape, teacher: Shape, pairs: Pairs) -> list[str]:
        """Why this loss cannot be trained with these pairs of layers; empty where it can."""
        return []

    def task_problems(self, task: Task, labels: Mapping[str, int] | None = None) -> list[Problem]:
        """Why this loss cannot be used for a task, with key paths inside of the loss; empty where it can.

        Args:
            task: The task.
            labels: The head's label names and ids, where they are known.
        """
        return []

    def state_of(self, rows: datasets.Dataset, labels: Mapping[str, int]) -> Tensor | None:
        """What the loss needs to know of the train rows; it gets it back in each `Step`.

        Args:
            rows: Encoded train rows.
            labels: The head's label names and ids.
        """
        return None

    def units(self, batch: Units) -> Tensor:
        """What `compute` divides by, the weight of its mean in a larger batch's: by default the rows.

        A step's batch may be split, into accumulated batches and over processes. The mean over all of it is the sum
        of the parts' means, each times its share of the step's units.
        """
        return batch.rows

    def learned(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """A module that is trained with the student (a projection), or None."""
        return None

    def learned_as(self, key: str) -> str:
        """The name of what it learns. Losses that give the same name learn one module; the default is its own `key`."""
        return key

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        """The loss, a scalar without its weight."""
        raise NotImplementedError
