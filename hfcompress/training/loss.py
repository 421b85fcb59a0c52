"""The base class of training losses, and the data that they get."""

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
    from hfcompress.models.forward import Observation


Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Step:
    """The data of one training step that a loss is computed from.

    Attributes:
        student: The outputs of the student, with gradients.
        teacher: The outputs of the teachers for the same rows; None if no loss needs a teacher.
        mask: `(batch, length)`, true at real tokens.
        labels: `(batch,)` of a sequence head; `(batch, length)` of a token or mask head, -100 where a token has no
            label; `(batch, 2)`, start and end, of a span head. None if the data has no labels.
        pairs: `(m, g)`: student layer `m` learns from teacher layer `g`, both from 1.
        task: The task: its `head`, and the loss of its labels.
        dynamic: True if `pairs` are only a start, and the hidden-state loss chooses its own teacher layers.
        state: The result of the loss's `state_of`.
    """

    student: Observation
    teacher: Observation | None
    mask: Tensor
    labels: Tensor | None
    pairs: Pairs
    task: Task
    dynamic: bool = False
    state: Tensor | None = None

    def require_teacher(self) -> Observation:
        """Returns the outputs of the teachers, for a loss that needs them."""
        assert self.teacher is not None
        return self.teacher


@dataclass(frozen=True)
class Units:
    """The counts that a loss may divide by in a batch; each is a scalar tensor.

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
        """The number of rows."""
        import torch

        return torch.tensor(float(len(self.mask)), device=self.mask.device)

    @property
    def tokens(self) -> Tensor:
        """The number of real tokens."""
        return self.mask.sum().float()

    @property
    def token_pairs(self) -> Tensor:
        """The number of pairs of real tokens of the same row."""
        return self.mask.sum(1).float().pow(2).sum()

    @property
    def places(self) -> Tensor:
        """The number of tokens, padding included."""
        return self.rows * self.mask.shape[1]

    @property
    def labelled_tokens(self) -> Tensor:
        """The number of tokens that have a label."""
        assert self.labels is not None
        return (self.labels != -100).sum().float()


class Ramp(StrictModel):
    """A weight that changes from the first step to the last."""

    start: float = Field(ge=0)
    end: float = Field(ge=0)
    schedule: Literal["linear", "cosine"] = "linear"
    """The course between them; `cosine` changes slowly near the start and the end."""

    def at(self, progress: float) -> float:
        """Computes the weight when a share `progress` of the steps is done."""
        share = progress if self.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * share


def _number_or_ramp(value: Any) -> Any:
    """Reads a weight as a number or as a mapping, so that an error names only one of the two."""
    if isinstance(value, (dict, Ramp)):
        return Ramp.model_validate(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"a weight is a number of 0 or more, or a mapping with start and end, not {value!r}")
    return float(value)


_Spelled = Annotated[float, Field(ge=0)] | Ramp
Weight = Annotated[float | Ramp, BeforeValidator(_number_or_ramp, json_schema_input_type=_Spelled)]


class Loss(Component):
    """A term of the training objective."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """The inputs besides logits: any of `hidden_states`, `queries`, `keys`, `values`."""
    needs_logits: ClassVar[bool] = False
    """True if it is computed from the logits."""
    needs_teacher: ClassVar[bool] = True
    """True if it compares student and teacher."""
    uses_layer_map: ClassVar[bool] = True
    """True if it compares the pairs of layers of the layer map; it matters only with `needs`."""
    first_token_only: ClassVar[bool] = False
    """True if it uses the hidden states of the first token only."""

    weight: Weight = 1.0
    """The factor of this loss in the sum: a number, or `{start, end, schedule}` to change it over the steps."""

    def weight_at(self, progress: float) -> float:
        """Computes the factor when a share `progress` of the steps is done."""
        return self.weight.at(progress) if isinstance(self.weight, Ramp) else self.weight

    def layers(self, student: Shape, teacher: Shape, pairs: Pairs) -> Pairs:
        """Lists the pairs of layers that it compares: by default, with `uses_layer_map`, those of the layer map."""
        return pairs if self.uses_layer_map else ()

    def problems(self, student: Shape, teacher: Shape) -> list[str]:
        """Lists the reasons why this loss cannot compare these two models."""
        return []

    def map_problems(self, student: Shape, teacher: Shape, pairs: Pairs) -> list[str]:
        """Lists the reasons why this loss cannot be trained with these pairs of layers."""
        return []

    def task_problems(self, task: Task, labels: Mapping[str, int] | None = None) -> list[Problem]:
        """Lists the problems of this loss with a task; their keys are paths inside the loss.

        Args:
            task: The task.
            labels: The label names and ids of the task head; None if they are not known.
        """
        return []

    def state_of(self, rows: datasets.Dataset, labels: Mapping[str, int]) -> Tensor | None:
        """Computes from the train rows a tensor that the loss needs in every step; each `Step` has it as `state`.

        Args:
            rows: Encoded train rows.
            labels: The label names and ids of the task head.
        """
        return None

    def units(self, batch: Units) -> Tensor:
        """Counts the units that `compute` takes the mean over: by default rows.

        The batch of a step may be split into accumulated batches and over processes. The mean over the whole step is
        the sum of the means of the parts, each multiplied by its share of the step's units.
        """
        return batch.rows

    def make_projection(self, student: Shape, teacher: Shape) -> nn.Module | None:
        """Makes a module that is trained with the student, such as a projection; None if the loss needs none."""
        return None

    def projection_name(self, key: str) -> str:
        """Names this module; losses that return the same name share one module. The default is the loss's own `key`."""
        return key

    def compute(self, step: Step, learned: nn.Module | None) -> Tensor:
        """Computes the loss, a scalar, without its weight."""
        raise NotImplementedError
