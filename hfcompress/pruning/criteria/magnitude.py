"""Magnitude: scores by the norm of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.linears import layer_linears
from hfcompress.pruning.criteria.base import Calibration, Criterion, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class Magnitude(Criterion):
    """The norm of all weights that are removed with a unit or a hidden dimension; for a single weight, `|w|`.

    Biases and the weights of norms are left out. Whole layers are not scored: the output of a layer depends on the
    norms around it more than on the size of its weights.
    """

    source: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626; by unit, Li et al. 2017, arXiv:1608.08710"
    scored: ClassVar[frozenset[str]] = frozenset({"units", "hidden", "weights"})

    norm: Literal["l1", "l2"] = "l2"
    """`l1` is the sum of absolute weights, `l2` the root of the sum of squares; equal for single weights."""

    def scores(self, model: PreTrainedModel, calibration: Calibration) -> Scores:
        modules = spec_of(model).modules
        layers = list(zip(layers_of(model), *unit_counts(model), strict=True))
        return Scores(
            [self._units(layer, modules.head_rows, modules.attention_output, count) for layer, count, _ in layers],
            [self._units(layer, modules.neuron_rows, modules.ffn_out, count) for layer, _, count in layers],
        )

    def hidden_scores(self, model: PreTrainedModel, calibration: Calibration) -> Tensor:
        import torch

        from hfcompress.models.weight_axes import axes_of
        from hfcompress.pruning.hidden_dimensions import pooler_places

        sums, axes = torch.zeros(model.config.hidden_size, device=model.device), axes_of(model)
        # A pooler's outputs are as wide as the residual stream, but no part of it.
        pooled = pooler_places(model, axes)
        for name, weight in model.named_parameters():
            places = [
                axis for axis, kind in enumerate(axes[name]) if kind == ("residual",) and (name, axis) not in pooled
            ]
            if weight.dim() > 1 and places:
                powers = self._powers(weight)
                for axis in places:
                    sums += powers.movedim(axis, 0).flatten(1).sum(1)
                if len(places) == 2:
                    # If both axes are hidden dimensions, the row and the column of a dimension share one weight.
                    sums -= powers.diagonal()
        return self._root(sums)

    def weight_scores(self, model: PreTrainedModel, calibration: Calibration) -> dict[str, Tensor]:
        linears = layer_linears(model).items()
        return {f"{name}.weight": module.weight.detach().float().abs() for name, module in linears}

    def _units(self, layer: nn.Module, rows: Mapping[str, int], columns: str, count: int) -> Tensor:
        """Computes the norms of `count` units: of their columns in one module, and their rows in others.

        Args:
            layer: The layer.
            rows: By module path, the number of parts side by side in which each unit has rows.
            columns: Path of the module in which each unit has columns.
            count: The number of units.
        """
        sums = _by_unit(self._powers(_weight(layer, columns)).sum(0), count)
        for path, parts in rows.items():
            sums = sums + _by_unit(self._powers(_weight(layer, path)).sum(1), count, parts)
        return self._root(sums)

    def _powers(self, weight: Tensor) -> Tensor:
        magnitudes = weight.detach().float().abs()
        return magnitudes if self.norm == "l1" else magnitudes.square()

    def _root(self, sums: Tensor) -> Tensor:
        return sums if self.norm == "l1" else sums.sqrt()


def _weight(layer: nn.Module, path: str) -> Tensor:
    return layer.get_parameter(f"{path}.weight")


def _by_unit(values: Tensor, count: int, parts: int = 1) -> Tensor:
    """Sums the values of each of `count` units, in `parts` parts side by side."""
    return values.reshape(parts, count, -1).sum((0, 2)) if count else values.new_zeros(0)
