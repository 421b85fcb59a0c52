"""What would change the loss least if it went, to first order."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.model.gradients import mean_stream_gradients, mean_unit_gradients, mean_weight_gradients

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Taylor(DataCriterion):
    """`I = mean over rows |ξ ∂L/∂ξ|` at `ξ = 1`, the gate on a head's or neuron's output.

    The gradient is taken row by row (each row has gates of its own), so the score depends neither on the batch size
    nor on which rows share a batch. Of hidden dimensions ξ multiplies a dimension wherever a layer, or what follows
    the last one, reads the residual stream (`model/gradients.py`). Of weights it is `I = mean over batches |w ∂L/∂w|`
    of a batch's mean loss.
    """

    source: ClassVar[str] = (
        "Molchanov et al. 2017, arXiv:1611.06440, eq. 8; Michel et al. 2019, arXiv:1905.10650, eq. 5; weights: "
        "Molchanov et al. 2019, arXiv:1906.10771"
    )
    scored: ClassVar[frozenset[str]] = frozenset({"units", "hidden", "weights"})

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        batches = calibration.batches(self.rows)
        return Scores(*mean_unit_gradients(model, batches, calibration.loss, calibration.total, torch.abs))

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        import torch

        batches = calibration.batches(self.rows)
        return mean_stream_gradients(model, batches, calibration.loss, calibration.total, torch.abs)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        import torch

        batches = calibration.batches(self.rows)
        means = mean_weight_gradients(model, batches, calibration.loss, calibration.total, torch.abs)
        return {name: model.get_parameter(name).detach().float().abs() * mean for name, mean in means.items()}
