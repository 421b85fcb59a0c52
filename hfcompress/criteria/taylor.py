"""Units whose removal would change the loss least, to first order."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.criteria.base import Calibration, DataCriterion, Scores
from hfcompress.model.gates import gated, unit_counts
from hfcompress.model.observe import observe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Taylor(DataCriterion):
    """`I = mean over rows |ξ ∂L/∂ξ|` at `ξ = 1`, the gate on a head's or neuron's output.

    The gradient is taken row by row (each row has gates of its own), so the score depends neither on the batch size
    nor on which rows share a batch.
    """

    source: ClassVar[str] = (
        "Molchanov et al. 2017, arXiv:1611.06440, eq. 8; Michel et al. 2019, arXiv:1905.10650, eq. 5"
    )

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        device = next(model.parameters()).device
        counts = unit_counts(model)
        sums = [[torch.zeros(n, device=device) for n in units] for units in counts]
        rows = 0
        frozen = [p for p in model.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            for batch in calibration.batches(self.rows):
                labels = batch["labels"].to(device)
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                gates = [[torch.ones(len(labels), n, device=device, requires_grad=True) for n in u] for u in counts]
                with gated(model, *gates):
                    logits, mask = observe(model, inputs).logits, inputs["attention_mask"].bool()
                    loss = calibration.loss(logits, labels, mask) * len(labels)
                flat = [gate for units in gates for gate in units]
                gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
                for units in sums:
                    for total in units:
                        gradient = next(gradients)
                        if gradient is not None:
                            total += gradient.abs().sum(0)
                rows += len(labels)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return Scores([s / max(rows, 1) for s in sums[0]], [s / max(rows, 1) for s in sums[1]])
