"""Random scores: the baseline that every other criterion must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from hfcompress.models.architectures import unit_counts
from hfcompress.models.linears import layer_linears
from hfcompress.pruning.criteria.base import GRANULARITIES, Calibration, Criterion, Scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel


class Random(Criterion):
    """Scores drawn from a uniform distribution."""

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """The seed to draw the scores; the default is the recipe's."""

    source: ClassVar[str] = "the control of Gale et al. 2019, arXiv:1902.09574"
    scored: ClassVar[frozenset[str]] = frozenset(GRANULARITIES)

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        draw = _make_draw(model, calibration.seed)
        heads, neurons = unit_counts(model)
        return Scores([draw(n) for n in heads], [draw(n) for n in neurons])

    def layer_scores(self, model: PreTrainedModel, calibration: Calibration) -> list[float]:
        drawn: list[float] = _make_draw(model, calibration.seed)(model.config.num_hidden_layers).tolist()
        return drawn

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        return _make_draw(model, calibration.seed)(model.config.hidden_size)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        draw = _make_draw(model, calibration.seed)
        return {f"{name}.weight": draw(*module.weight.shape) for name, module in layer_linears(model).items()}


def _make_draw(model: PreTrainedModel, seed: int) -> Callable[..., Tensor]:
    """Makes a function that draws scores on the CPU, so that every device gets the same ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(shape, generator=generator).to(model.device)
