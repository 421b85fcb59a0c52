"""Head importance of Michel et al.: scores units by the gradient of the loss, normalized by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.pruning.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.pruning.gradients import mean_unit_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Michel(DataCriterion):
    """`I = mean over rows |∂L/∂ξ|` at `ξ = 1`, divided by its L2 norm over the heads (or neurons) of the layer.

    Within a layer the ranking is that of `taylor`. Across layers it differs: here all layers matter equally, and with
    `taylor` a whole layer can matter less than another.
    """

    source: ClassVar[str] = "Michel et al. 2019, arXiv:1905.10650, eq. 5 and section 4.1"

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        batches = calibration.batches(self.rows)
        heads, neurons = mean_unit_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, torch.abs)
        return Scores([_normalize(layer) for layer in heads], [_normalize(layer) for layer in neurons])


def _normalize(scores: Tensor) -> Tensor:
    # If all gradients of a layer are zero, its scores stay zero.
    return scores / (scores.norm() + 1e-20)
