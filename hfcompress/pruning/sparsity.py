"""Zeros inside the linear layers: where they go, how they stay, and what they save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from hfcompress.models.linears import layer_linears
from hfcompress.pruning.sparsity_pattern import Pattern
from hfcompress.training.overlay import TrainingOverlay
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def zero(model: PreTrainedModel, pattern: Pattern, scores: Mapping[str, Tensor]) -> None:
    """Sets the weights of the lowest scores to zero, in place.

    Args:
        model: The model.
        pattern: How many, and where.
        scores: By the weight's name in the state dict, of its shape.

    Raises:
        HfcompressError: where the pattern does not tile a matrix; nothing is changed then.
    """
    apply_zeros(model, {name: ~gone for name, gone in zeros(model, pattern, scores).items()})


def zeros(model: PreTrainedModel, pattern: Pattern, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which weights have the lowest scores: true where a pattern puts a zero, by name and of the weight's shape.

    Exactly the share is chosen, rounded to whole blocks; of equal scores the first. A block's score is the sum of its
    weights'.

    Raises:
        HfcompressError: where the pattern does not tile a matrix.
    """
    require_tiling(model, pattern)
    if pattern.n_of_m:
        n, m = pattern.n_of_m
        return {name: _in_groups(scores[name], m, m - n) for name in _linears(model)}
    if pattern.scope == "global":
        return _lowest_of_all({name: scores[name] for name in _linears(model)}, pattern.block, pattern.zeros)
    by_row = pattern.scope == "row"
    return {name: lowest(scores[name], pattern.block, pattern.zeros, by_row) for name in _linears(model)}


def require_tiling(model: PreTrainedModel, pattern: Pattern) -> None:
    """Raises an HfcompressError where the pattern's groups or blocks do not tile a matrix of the layers."""
    for name, module in _linears(model).items():
        height, width = module.weight.shape
        if problem := pattern.untiled(name, height, width):
            raise HfcompressError(problem)


def lowest(scores: Tensor, tile: tuple[int, int], share: float, by_row: bool) -> Tensor:
    """True in that share of the tiles whose scores have the lowest sums.

    Args:
        scores: `(rows, columns)`, which the tiles tile.
        tile: Rows and columns of a tile.
        share: Which share of the tiles, rounded.
        by_row: The share of each row of tiles instead of the matrix.
    """
    sums = _sums(scores, tile)
    compared = sums if by_row else sums.reshape(1, -1)
    return _spread(_lowest(compared, round(compared.shape[-1] * share)).view_as(sums), tile)


def _lowest_of_all(scores: Mapping[str, Tensor], tile: tuple[int, int], share: float) -> dict[str, Tensor]:
    sums = {name: _sums(values, tile) for name, values in scores.items()}
    everything = torch.cat([values.flatten() for values in sums.values()])
    chosen = _lowest(everything, round(len(everything) * share)).split([values.numel() for values in sums.values()])
    return {name: _spread(part.view_as(sums[name]), tile) for name, part in zip(sums, chosen, strict=True)}


def _in_groups(scores: Tensor, size: int, count: int) -> Tensor:
    return _lowest(scores.detach().unflatten(1, (scores.shape[1] // size, size)), count).flatten(1)


def _sums(scores: Tensor, tile: tuple[int, int]) -> Tensor:
    (rows, columns), (height, width) = tile, scores.shape
    return scores.detach().unflatten(1, (width // columns, columns)).unflatten(0, (height // rows, rows)).sum((1, 3))


def _spread(tiles: Tensor, tile: tuple[int, int]) -> Tensor:
    return tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)


def _lowest(values: Tensor, count: int) -> Tensor:
    """True at the `count` lowest along the last dimension; of equal ones the first."""
    order = values.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def kept_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Which weights of the layers' linear modules are not zero, by their names in the state dict."""
    return {name: module.weight.detach() != 0 for name, module in _linears(model).items()}


def apply_zeros(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model itself, its weights set to zero where `kept` (as `kept_weights` gives it) is false."""
    with torch.no_grad():
        for name, module in _linears(model).items():
            module.weight.masked_fill_(~kept[name].to(module.weight.device), 0)
    return model


class KeptZeros(TrainingOverlay):
    """The zeros that a model has when this is made are set back to zero after each step of its training."""

    closing: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        kept = kept_weights(model)
        self.names = tuple(kept)
        for index, mask in enumerate(kept.values()):
            self.register_buffer(f"kept_{index}", mask)

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Sets the remembered zeros, whatever the step."""
        apply_zeros(model, dict(zip(self.names, self.buffers(), strict=True)))


def share_of_zeros(model: PreTrainedModel) -> float:
    """Zeros among the weights of the layers' linear modules, as a share."""
    weights = [module.weight for module in _linears(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)


def sparse_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model when each of the layers' linear weights is stored in its cheapest format, the rest dense."""
    sparse = {module.weight.data_ptr() for module in _linears(model).values()}
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(min(formats(t).values()) if at in sparse else t.nbytes for at, t in tensors.items())


def formats(weight: Tensor) -> dict[str, int]:
    """Bytes of a matrix `(rows, columns)`, by format; of those formats that can hold it.

    `dense`; `bitmask`: a bit a weight, and the values that are not zero; `csr`: a 16-bit column for each such value
    and a 32-bit offset for each row; `2:4`: two values of each four along a row, and two bits for the place of each.
    """
    size, (rows, columns) = weight.element_size(), weight.shape
    used = int((weight != 0).sum())
    found = {"dense": weight.nbytes, "bitmask": -(-weight.numel() // 8) + used * size}
    if columns <= 2**16:
        found["csr"] = used * (size + 2) + 4 * (rows + 1)
    if columns % 4 == 0 and bool(((weight != 0).unflatten(1, (columns // 4, 4)).sum(-1) <= 2).all()):
        found["2:4"] = weight.numel() // 2 * size + -(-weight.numel() // 8)
    return found


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {f"{name}.weight": module for name, module in layer_linears(model).items()}
