"""First-order Taylor expansion: scores by the change of the loss that the gradient predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.pruning.criteria.base import GradientCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Taylor(GradientCriterion):
    """`I = mean over rows |ξ ∂L/∂ξ|` at `ξ = 1`, the gate on a head's or neuron's output.

    The gradient is taken for each row, so the score does not depend on the batches. For hidden dimensions, ξ multiplies
    a dimension wherever a layer, or a module after the last one, reads the residual stream (`pruning/gradients.py`).
    For weights it is `I = mean over batches |w ∂L/∂w|` of a batch's mean loss.
    """

    source: ClassVar[str] = (
        "Molchanov et al. 2017, arXiv:1611.06440, eq. 8; Michel et al. 2019, arXiv:1905.10650, eq. 5; weights: "
        "Molchanov et al. 2019, arXiv:1906.10771"
    )
    scored: ClassVar[frozenset[str]] = frozenset({"units", "hidden", "weights"})

    @staticmethod
    def transform(gradient: Tensor) -> Tensor:
        return gradient.abs()
