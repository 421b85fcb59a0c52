"""Fisher information: scores by the squared gradient of the loss, which stands for its curvature."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.pruning.criteria.base import GradientCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Fisher(GradientCriterion):
    """`I = mean over rows (∂L/∂ξ)²` at `ξ = 1`, the gate on a head's or neuron's output.

    It is the diagonal of the empirical Fisher matrix of the gates, which stands for the Hessian: at a minimum of the
    loss, to cut a unit costs `½ I`; the half, common to all, is left out, as in the paper. Scores of all layers are
    in one unit, that of the squared loss. Of hidden dimensions ξ multiplies a dimension wherever a layer, or what
    follows the last one, reads the residual stream (`pruning/gradients.py`). Of weights it is
    `I = w² mean over batches (∂L/∂w)²` of a batch's mean loss, since a gradient for each row and each weight is more
    than can be afforded; it is smaller the larger the batch.
    """

    comparable: ClassVar[bool] = True
    source: ClassVar[str] = "Kwon et al. 2022, arXiv:2204.09656, section 4.1; LeCun et al. 1989, Optimal Brain Damage"
    scored: ClassVar[frozenset[str]] = frozenset({"units", "hidden", "weights"})

    @staticmethod
    def of(gradient: Tensor) -> Tensor:
        return gradient.square()
