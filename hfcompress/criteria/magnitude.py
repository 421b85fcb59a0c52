"""Small weights matter least."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from hfcompress.criteria.base import Calibration, Criterion, Scores
from hfcompress.model.family import family_of
from hfcompress.model.gates import unit_counts

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Magnitude(Criterion):
    """The L2 norm of all the weights that cutting a unit would remove."""

    source: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626, by unit"

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        family = family_of(model)
        heads, neurons = [], []
        for layer, count in zip(family.stack(model), unit_counts(model)[0], strict=True):
            rows = sum(_squares(layer, path, 1) for path in (family.query, family.key, family.value))
            squares = rows + _squares(layer, family.attention_output, 0)
            heads.append(squares.reshape(count, -1).sum(-1).sqrt() if count else squares)
            neurons.append((_squares(layer, family.ffn_in, 1) + _squares(layer, family.ffn_out, 0)).sqrt())
        return Scores(heads, neurons)


def _squares(layer: nn.Module, path: str, axis: int) -> Tensor:
    weight: Tensor = layer.get_submodule(path).weight  # type: ignore[assignment]
    return weight.detach().float().pow(2).sum(axis)
