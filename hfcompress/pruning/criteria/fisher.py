"""Fisher information: scores by the squared gradient of the loss, which approximates its second derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.pruning.criteria.base import GradientCriterion

if TYPE_CHECKING:
    from torch import Tensor


class Fisher(GradientCriterion):
    """`I = mean over rows (∂L/∂ξ)²` at `ξ = 1`, the gate on a head's or neuron's output.

    It is the diagonal of the empirical Fisher matrix of the gates, which approximates the Hessian: at a minimum of the
    loss, cutting a unit costs `½ I`. The factor ½ is the same for all units and is left out, as in the paper. Scores of
    all layers can be compared. For hidden dimensions, ξ multiplies a dimension wherever a layer, or a module after the
    last one, reads the residual stream (`pruning/gradients.py`). For weights it is `I = w² mean over batches (∂L/∂w)²`
    of a batch's mean loss, because a gradient for each row and each weight would be too expensive; larger batches give
    smaller scores.
    """

    comparable: ClassVar[bool] = True
    source: ClassVar[str] = "Kwon et al. 2022, arXiv:2204.09656, section 4.1; LeCun et al. 1989, Optimal Brain Damage"
    scored: ClassVar[frozenset[str]] = frozenset({"units", "hidden", "weights"})

    @staticmethod
    def transform(gradient: Tensor) -> Tensor:
        return gradient.square()
