"""L0 regularization: learns gates on heads, neurons and whole blocks together with the model, to an exact size."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hfcompress.pruning.criteria.base import LearnedCriterion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.costs import Target
    from hfcompress.training.overlay import TrainingOverlay


class L0(LearnedCriterion):
    """Hard-concrete gates; a Lagrangian moves their expected cost to the budget.

    At the end, the units with the highest probability stay, as many as the budget has room for. The value of each gate
    is multiplied into the weights.
    """

    source: ClassVar[str] = "Xia et al. 2022 (CoFi), arXiv:2204.00408; gates: Louizos et al. 2018, arXiv:1712.01312"

    learning_rate: float = Field(default=0.01, gt=0)
    """Learning rate of the gates' log α, constant during the training."""
    multiplier_learning_rate: float = Field(default=0.01, gt=0)
    """Learning rate of the Lagrange multipliers, constant; a short training needs more (LLM-Shearing uses 1)."""
    warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the target falls from the whole model to the budget."""
    temperature: float = Field(default=2 / 3, gt=0)
    """β: a lower value moves sampled gates closer to 0 or 1."""
    heads_start: float = 10.0
    """log α of heads and blocks at the start; by default they are almost always open."""
    neurons_start: float = 0.0
    """log α of neurons at the start; by default they are open with probability 5/6."""

    def masks(self, model: PreTrainedModel, target: Target) -> TrainingOverlay:
        from hfcompress.pruning.masks.hard_concrete import HardConcrete, L0Settings

        settings = L0Settings(
            self.learning_rate, self.multiplier_learning_rate, self.warmup, self.temperature,
            self.heads_start, self.neurons_start,
        )  # fmt: skip
        return HardConcrete(model, target, settings)
