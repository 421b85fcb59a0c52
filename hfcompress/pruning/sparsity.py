"""Zeros inside the linear layers: selects them, keeps them during training, and counts the bytes that they save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from hfcompress.models.linears import layer_linears
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.training.overlay import TrainingOverlay
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def zero(model: PreTrainedModel, pattern: SparsityPattern, scores: Mapping[str, Tensor]) -> None:
    """Sets the weights of the lowest scores to zero, in place.

    Args:
        model: The model.
        pattern: The number and the places of the zeros.
        scores: For each weight's name in the state dict, a tensor of its shape.

    Raises:
        HfcompressError: if the pattern does not divide a matrix; no weight is changed then.
    """
    apply_zeros(model, {name: ~gone for name, gone in select_zeros(model, pattern, scores).items()})


def select_zeros(model: PreTrainedModel, pattern: SparsityPattern, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Selects the weights with the lowest scores: true where the pattern puts a zero, by name.

    Exactly the pattern's share is selected, rounded to whole blocks; of equal scores the first. The score of a block is
    the sum over its weights.

    Raises:
        HfcompressError: if the pattern does not divide a matrix.
    """
    require_tiling(model, pattern)
    if pattern.n_of_m:
        n, m = pattern.n_of_m
        return {name: _select_in_groups(scores[name], m, m - n) for name in _linears(model)}
    if pattern.scope == "global":
        return _select_lowest_of_all({name: scores[name] for name in _linears(model)}, pattern.block, pattern.zeros)
    by_row = pattern.scope == "row"
    return {name: select_lowest(scores[name], pattern.block, pattern.zeros, by_row) for name in _linears(model)}


def require_tiling(model: PreTrainedModel, pattern: SparsityPattern) -> None:
    """Raises an HfcompressError if the pattern's groups or blocks do not divide a matrix of the layers."""
    for name, module in _linears(model).items():
        height, width = module.weight.shape
        if problem := pattern.find_problem(name, height, width):
            raise HfcompressError(problem)


def select_lowest(scores: Tensor, tile: tuple[int, int], share: float, by_row: bool) -> Tensor:
    """Selects the share of the tiles whose scores have the lowest sums: a mask that is true there.

    Args:
        scores: `(rows, columns)`, multiples of the tile's.
        tile: Rows and columns of a tile.
        share: The share of the tiles, rounded to whole tiles.
        by_row: True to select this share in each row of tiles instead of the whole matrix.
    """
    sums = _sum_tiles(scores, tile)
    compared = sums if by_row else sums.reshape(1, -1)
    return _expand_tiles(_mark_lowest(compared, round(compared.shape[-1] * share)).view_as(sums), tile)


def _select_lowest_of_all(scores: Mapping[str, Tensor], tile: tuple[int, int], share: float) -> dict[str, Tensor]:
    sums = {name: _sum_tiles(values, tile) for name, values in scores.items()}
    everything = torch.cat([values.flatten() for values in sums.values()])
    chosen = _mark_lowest(everything, round(len(everything) * share)).split(
        [values.numel() for values in sums.values()]
    )
    return {name: _expand_tiles(part.view_as(sums[name]), tile) for name, part in zip(sums, chosen, strict=True)}


def _select_in_groups(scores: Tensor, size: int, count: int) -> Tensor:
    return _mark_lowest(scores.detach().unflatten(1, (scores.shape[1] // size, size)), count).flatten(1)


def _sum_tiles(scores: Tensor, tile: tuple[int, int]) -> Tensor:
    (rows, columns), (height, width) = tile, scores.shape
    return scores.detach().unflatten(1, (width // columns, columns)).unflatten(0, (height // rows, rows)).sum((1, 3))


def _expand_tiles(tiles: Tensor, tile: tuple[int, int]) -> Tensor:
    return tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)


def _mark_lowest(values: Tensor, count: int) -> Tensor:
    """Marks the `count` lowest values along the last dimension as true; of equal values the first."""
    order = values.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def nonzero_masks(model: PreTrainedModel) -> dict[str, Tensor]:
    """Makes a mask of the nonzero weights of each linear module of the layers, by name in the state dict."""
    return {name: module.weight.detach() != 0 for name, module in _linears(model).items()}


def apply_zeros(model: PreTrainedModel, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    """Sets the weights to zero where `kept` (as `nonzero_masks` makes it) is false; returns the model itself."""
    with torch.no_grad():
        for name, module in _linears(model).items():
            module.weight.masked_fill_(~kept[name].to(module.weight.device), 0)
    return model


class FixedZeros(TrainingOverlay):
    """Sets the weights that were zero before the training back to zero after each step."""

    closing: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        kept = nonzero_masks(model)
        self.names = tuple(kept)
        for index, mask in enumerate(kept.values()):
            self.register_buffer(f"kept_{index}", mask)

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        """Sets the weights back to zero, at any step."""
        apply_zeros(model, dict(zip(self.names, self.buffers(), strict=True)))


def share_of_zeros(model: PreTrainedModel) -> float:
    """Computes the share of zeros among the weights of the layers' linear modules."""
    weights = [module.weight for module in _linears(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)


def sparse_bytes(model: PreTrainedModel) -> int:
    """Counts the bytes of the model with each of the layers' linear weights in its smallest format, the rest dense."""
    sparse = {module.weight.data_ptr() for module in _linears(model).values()}
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(min(storage_sizes(t).values()) if at in sparse else t.nbytes for at, t in tensors.items())


def storage_sizes(weight: Tensor) -> dict[str, int]:
    """Counts the bytes of a matrix `(rows, columns)` in each format that can hold it.

    The formats are `dense`; `bitmask`: one bit for each weight, and the nonzero values; `csr`: the nonzero values with
    a 16-bit column each, and a 32-bit offset for each row; `2:4`: two of each four values along a row, with two bits
    for the place of each.
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
