"""Movement pruning: learns scores of heads and neurons, or of weights, that grow as weights move away from zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from hfcompress.pruning.criteria.base import LearnedCriterion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.pruning.costs import Target
    from hfcompress.pruning.masks.movement import MovementSettings
    from hfcompress.pruning.sparsity_pattern import SparsityPattern
    from hfcompress.training.overlay import TrainingOverlay


class Movement(LearnedCriterion):
    """`W' = W ⊙ M(S)`, with `∂L/∂S = ∂L/∂W' ⊙ W`: the scores are learned straight through the mask.

    The cut grows by the cubic curve. Scores of heads and neurons are those of Lagunas et al. 2021 (arXiv:2109.04838).
    """

    source: ClassVar[str] = "Sanh et al. 2020, arXiv:2005.07683, section 4; by unit: Lagunas et al. 2021, 2109.04838"
    scored: ClassVar[frozenset[str]] = frozenset({"units", "weights"})

    mode: Literal["topk", "threshold"] = "topk"
    """`topk` masks the lowest scores, as many as the budget or the pattern needs at that step. `threshold` masks scores
    below `threshold`; `penalty` pulls scores down. At the end both reach the budget or the pattern exactly."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Learning rate of the scores; it follows the model's learning-rate schedule."""
    begin: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps before the first cut."""
    end: float = Field(default=0.8, gt=0, le=1)
    """Share of the steps after which the cut is complete."""
    threshold: float = Field(default=0.1, gt=0, lt=1)
    """τ at the end: a weight or unit is kept if `σ(S)` is above it."""
    penalty: float = Field(default=400.0, gt=0)
    """λ at the end, the factor of the mean of `σ(S)` in the loss; a larger value masks more."""

    @model_validator(mode="after")
    def _check_options(self) -> Movement:
        if self.end <= self.begin:
            raise ValueError(f"`end` ({self.end}) must come after `begin` ({self.begin})")
        idle = self.says("threshold", "penalty")
        if self.mode == "topk" and idle:
            raise ValueError(f"`{idle[0]}` is only for `mode: threshold`; leave it out")
        return self

    def masks(self, model: PreTrainedModel, target: Target) -> TrainingOverlay:
        from hfcompress.pruning.masks.movement import MovementUnits

        return MovementUnits(model, target, self._make_settings())

    def weight_masks(self, model: PreTrainedModel, pattern: SparsityPattern) -> TrainingOverlay:
        from hfcompress.pruning.masks.movement import MovementWeights

        return MovementWeights(model, pattern, self._make_settings())

    def _make_settings(self) -> MovementSettings:
        from hfcompress.pruning.masks.movement import MovementSettings

        threshold = self.threshold if self.mode == "threshold" else None
        return MovementSettings(self.learning_rate, self.begin, self.end, threshold, self.penalty)
