"""Head importance of Michel et al.: scores units by the gradient of the loss, relative to their own layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.pruning.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.pruning.gradients import mean_unit_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Michel(DataCriterion):
    """`I = mean over rows |∂L/∂ξ|` at `ξ = 1`, divided by its L2 norm over the heads (the neurons) of its layer.

    Within a layer it ranks as `taylor` does; across layers it does not: here every layer has its share of what
    matters, and there a layer may matter less than another as a whole.
    """

    source: ClassVar[str] = "Michel et al. 2019, arXiv:1905.10650, eq. 5 and section 4.1"

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        batches = calibration.batches(self.rows)
        heads, neurons = mean_unit_gradients(model, batches, calibration.loss, calibration.all_reduce_sum, torch.abs)
        return Scores([_normalised(layer) for layer in heads], [_normalised(layer) for layer in neurons])


def _normalised(scores: Tensor) -> Tensor:
    # A layer whose gradients are all zero stays so.
    return scores / (scores.norm() + 1e-20)
