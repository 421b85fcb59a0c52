"""The base classes of pruning criteria: a criterion scores the parts of a model; the lowest are cut first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from hfcompress.pruning.costs import Target
from hfcompress.utils.registry import Component, Registry

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.pruning.sparsity_pattern import Pattern
    from hfcompress.training.overlay import TrainingOverlay
    from hfcompress.utils.distributed import AllReduce

GRANULARITIES = ("units", "layers", "hidden", "weights")
"""What a criterion can score: heads and FFN neurons, whole layers, dimensions of the stream between them, weights."""


@dataclass(frozen=True)
class Scores:
    """How much each head and neuron matters; within a layer the least are cut first, and sums are compared.

    Attributes:
        heads: One tensor for each layer's weights, `(head groups,)`: of a decoder with grouped queries a unit is a
            key-value head with its queries, elsewhere a head.
        neurons: One tensor for each layer's weights, `(ffn,)`.
    """

    heads: list[Tensor]
    neurons: list[Tensor]


@dataclass(frozen=True)
class Calibration:
    """Rows that a criterion may look at.

    Attributes:
        batches: This process's share of so many rows, in encoded batches with labels, made anew at each call. Which
            rows share a batch does not depend on the number of processes.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.
        seed: For criteria that draw.
        all_reduce_sum: Sums tensors over the processes, in place; all of them go on with the same sums.
    """

    batches: Callable[[int], Iterable[Mapping[str, Tensor]]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    seed: int
    all_reduce_sum: AllReduce = lambda _: None


class Criterion(Component):
    """Scores the parts of a model; a subclass overrides a method for each granularity that it names in `scored`."""

    scored: ClassVar[frozenset[str]] = frozenset({"units"})
    """Those of `GRANULARITIES` that it scores."""
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    """True if its scores of heads and of neurons are in one unit over all layers, such as an increase of the loss."""
    refits: ClassVar[bool] = False
    """True if its scores assume that the weights that stay are refitted to take over from those that go."""
    learned: ClassVar[bool] = False
    """True if it is trained with the model instead of scoring it."""

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        """Scores of every head and neuron of `model`, which is left as it was."""
        raise NotImplementedError

    def layer_scores(self, model: PreTrainedModel, calibration: Calibration) -> list[float]:
        """A score for each layer of `model`, which is left as it was."""
        raise NotImplementedError

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        """Scores `(hidden,)` of the dimensions of the residual stream of `model`, which is left as it was."""
        raise NotImplementedError

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        """Scores of each weight of the layers' linear modules, by its name in the state dict and of its shape."""
        raise NotImplementedError

    def sparsify(self, model: PreTrainedModel, pattern: Pattern, calibration: Calibration) -> None:
        """Sets the weights that matter least to zero, in place, as many and where the pattern says."""
        from hfcompress.pruning.sparsity import zero

        zero(model, pattern, self.weight_scores(model, calibration))


class DataCriterion(Criterion):
    """A criterion that looks at training rows."""

    needs_data: ClassVar[bool] = True

    rows: int = Field(default=2048, ge=1)
    """Training rows it looks at."""
    batch_size: int = Field(default=32, ge=1)
    """Rows that go through the model together."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Draws the rows; the default is the recipe's."""


class GradientCriterion(DataCriterion):
    """A criterion that is a mean of gradients: of gates, row by row; of weights, batch by batch."""

    @staticmethod
    def of(gradient: Tensor) -> Tensor:
        """What is taken of each gradient before the mean, and of each weight before they are multiplied."""
        raise NotImplementedError

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        from hfcompress.pruning.gradients import mean_unit_gradients

        batches = calibration.batches(self.rows)
        return Scores(*mean_unit_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.of))

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        from hfcompress.pruning.gradients import mean_stream_gradients

        batches = calibration.batches(self.rows)
        return mean_stream_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.of)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        from hfcompress.pruning.gradients import mean_weight_gradients

        batches = calibration.batches(self.rows)
        means = mean_weight_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.of)
        return {name: self.of(model.get_parameter(name).detach().float()) * mean for name, mean in means.items()}


class LearnedCriterion(Criterion):
    """Masks that are trained together with the model, and end in the same surgery."""

    learned: ClassVar[bool] = True

    def masks(self, model: PreTrainedModel, target: Target) -> TrainingOverlay:
        """Masks on heads and neurons before their training, for the model that they go on."""
        raise NotImplementedError

    def weight_masks(self, model: PreTrainedModel, pattern: Pattern) -> TrainingOverlay:
        """Masks on single weights before their training, for the model that they go on."""
        raise NotImplementedError


CRITERIA: Registry[Criterion] = Registry("hfcompress.pruning.criteria", Criterion)
AnyCriterion = Annotated[SerializeAsAny[Criterion], BeforeValidator(CRITERIA.parse)]
