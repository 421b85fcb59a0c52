"""The base classes of pruning criteria: a criterion scores the parts of a model, and the lowest are cut first."""

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

    from hfcompress.pruning.sparsity_pattern import SparsityPattern
    from hfcompress.training.overlay import TrainingOverlay
    from hfcompress.utils.distributed import AllReduce

GRANULARITIES = ("units", "layers", "hidden", "weights")
"""The parts that a criterion can score: heads and FFN neurons, whole layers, hidden dimensions, single weights."""


@dataclass(frozen=True)
class Scores:
    """The importance of each head and neuron; the lowest are cut first within a layer, and sums are compared.

    Attributes:
        heads: One tensor for each layer's weights, `(head groups,)`: in a decoder with grouped queries a unit is a
            key-value head with its queries, elsewhere a head.
        neurons: One tensor for each layer's weights, `(ffn,)`.
    """

    heads: list[Tensor]
    neurons: list[Tensor]


@dataclass(frozen=True)
class Calibration:
    """The rows that a criterion may use.

    Attributes:
        batches: A function of a number of rows; each call returns this process's share of them, in encoded batches with
            labels. The batches do not depend on the number of processes.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.
        seed: The seed of criteria that draw random numbers.
        all_reduce_sum: Sums tensors over the processes, in place; every process gets the same sums.
    """

    batches: Callable[[int], Iterable[Mapping[str, Tensor]]]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    seed: int
    all_reduce_sum: AllReduce = lambda _: None


class Criterion(Component):
    """Scores the parts of a model; a subclass overrides a method for each granularity that it names in `scored`."""

    scored: ClassVar[frozenset[str]] = frozenset({"units"})
    """Those of `GRANULARITIES` that the criterion scores."""
    needs_data: ClassVar[bool] = False
    comparable: ClassVar[bool] = False
    """True if scores of heads and neurons of all layers can be compared, such as increases of the loss."""
    refits: ClassVar[bool] = False
    """True if the scores assume that the remaining weights are refitted after the cut."""
    learned: ClassVar[bool] = False
    """True if the criterion is trained with the model instead of scoring it."""

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        """Scores every head and neuron of `model`, which is left as it was."""
        raise NotImplementedError

    def layer_scores(self, model: PreTrainedModel, calibration: Calibration) -> list[float]:
        """Scores each layer of `model`, which is left as it was."""
        raise NotImplementedError

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        """Scores the hidden dimensions of `model`, which is left as it was: `(hidden,)`."""
        raise NotImplementedError

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        """Scores each weight of the layers' linear modules: for its name in the state dict, a tensor of its shape."""
        raise NotImplementedError

    def sparsify(self, model: PreTrainedModel, pattern: SparsityPattern, calibration: Calibration) -> None:
        """Sets the weights that matter least to zero, in place, by the pattern."""
        from hfcompress.pruning.sparsity import zero

        zero(model, pattern, self.weight_scores(model, calibration))


class DataCriterion(Criterion):
    """A criterion that uses training rows."""

    needs_data: ClassVar[bool] = True

    rows: int = Field(default=2048, ge=1)
    """The number of training rows to use."""
    batch_size: int = Field(default=32, ge=1)
    """Rows of a batch."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """The seed to draw the rows; the default is the recipe's."""


class GradientCriterion(DataCriterion):
    """A criterion that is a mean of gradients: by gates for each row, by weights for each batch."""

    @staticmethod
    def transform(gradient: Tensor) -> Tensor:
        """Transforms each gradient before the mean, and each weight before it is multiplied with that mean."""
        raise NotImplementedError

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        from hfcompress.pruning.gradients import mean_unit_gradients

        batches = calibration.batches(self.rows)
        return Scores(
            *mean_unit_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.transform)
        )

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        from hfcompress.pruning.gradients import mean_stream_gradients

        batches = calibration.batches(self.rows)
        return mean_stream_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.transform)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        from hfcompress.pruning.gradients import mean_weight_gradients

        batches = calibration.batches(self.rows)
        means = mean_weight_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, self.transform)
        return {name: self.transform(model.get_parameter(name).detach().float()) * mean for name, mean in means.items()}


class LearnedCriterion(Criterion):
    """A criterion that trains masks together with the model; the closed parts are cut afterwards."""

    learned: ClassVar[bool] = True

    def masks(self, model: PreTrainedModel, target: Target) -> TrainingOverlay:
        """Makes the masks on heads and neurons of `model`, before their training."""
        raise NotImplementedError

    def weight_masks(self, model: PreTrainedModel, pattern: SparsityPattern) -> TrainingOverlay:
        """Makes the masks on single weights of `model`, before their training."""
        raise NotImplementedError


CRITERIA: Registry[Criterion] = Registry("hfcompress.pruning.criteria", Criterion)
AnyCriterion = Annotated[SerializeAsAny[Criterion], BeforeValidator(CRITERIA.parse)]
