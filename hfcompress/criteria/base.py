"""What a pruning criterion is: a score for every head and every FFN neuron."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from hfcompress.base.component import Component, Drawer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scores:
    """How much each unit matters; the least are cut first.

    Attributes:
        heads: One tensor a layer, `(heads,)`.
        neurons: One tensor a layer, `(ffn,)`.
    """

    heads: list[Tensor]
    neurons: list[Tensor]


@dataclass(frozen=True)
class Calibration:
    """Rows that a criterion may look at.

    Attributes:
        batches: Encoded batches with labels, made anew at each call.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.
        seed: For criteria that draw.
    """

    batches: Callable[[int], Iterable[Mapping[str, Tensor]]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    seed: int


class Criterion(Component):
    """A way to score heads and neurons."""

    needs_data: ClassVar[bool] = False

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        """Scores of every unit of `model`, which is left as it was."""
        raise NotImplementedError


class DataCriterion(Criterion):
    """A criterion that looks at training rows."""

    needs_data: ClassVar[bool] = True

    rows: int = Field(default=2048, ge=1)
    """Training rows it looks at, drawn with the recipe's seed."""


CRITERIA: Drawer[Criterion] = Drawer("hfcompress.criteria", Criterion)
AnyCriterion = Annotated[SerializeAsAny[Criterion], BeforeValidator(CRITERIA.parse)]
