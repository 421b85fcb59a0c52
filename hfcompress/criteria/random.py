"""The honest control: every other criterion must beat it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.criteria.base import Calibration, Criterion, Scores
from hfcompress.model.gates import unit_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Random(Criterion):
    """Scores drawn uniformly, by the recipe's seed."""

    source: ClassVar[str] = "the control of Gale et al. 2019, arXiv:1902.09574"

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        import torch

        generator = torch.Generator().manual_seed(calibration.seed)
        heads, neurons = unit_counts(model)
        return Scores(
            [torch.rand(n, generator=generator) for n in heads], [torch.rand(n, generator=generator) for n in neurons]
        )
