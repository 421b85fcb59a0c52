"""Optimal Brain Surgeon for one linear layer: the cost of removing inputs or weights, and the refit of the others.

The cost is the error of the layer's output, `tr(ΔW H ΔWᵀ)`, with `H` the second moment of its inputs (Hassibi & Stork
1993). All results are exact for this quadratic form, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.pruning.sparsity import select_lowest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfcompress.pruning.sparsity_pattern import SparsityPattern

DAMPING = 0.01
"""Added to the diagonal of a second moment, as a share of the diagonal's mean (Frantar & Alistarh 2023, section 4)."""
_PENDING = 128


class Moments:
    """Sums over the inputs of a linear layer: of outer products, of inputs, and their number."""

    def __init__(self, module: nn.Linear) -> None:
        import torch

        width, device = module.in_features, module.weight.device
        self.module = module
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.inputs = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        """Adds inputs `(tokens, width)`."""
        inputs = inputs.detach().float()
        self.products += inputs.T @ inputs
        self.inputs += inputs.sum(0)
        self.count += len(inputs)

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, to be added over processes."""
        return [self.products, self.inputs, self.count]

    @property
    def mean(self) -> Tensor:
        """The mean input, `(width,)`."""
        return self.inputs / self.count.clamp(min=1)

    def second_moment(self) -> Tensor:
        """Computes the damped mean of `x xᵀ`, `(width, width)`."""
        return damp(self.products / self.count.clamp(min=1))

    def centred_second_moment(self) -> Tensor:
        """Computes the damped second moment, around the mean if the layer has a bias: a bias can correct the mean."""
        if self.module.bias is None:
            return self.second_moment()
        return damp(self.products / self.count.clamp(min=1) - self.mean.outer(self.mean))


def damp(moment: Tensor) -> Tensor:
    """Adds `DAMPING` times the diagonal's mean to the diagonal of a second moment, or 1 if that mean is 0."""
    import torch

    added = DAMPING * moment.diagonal().mean().clamp(min=0) if len(moment) else moment.new_zeros(())
    return moment + torch.where(added > 0, added, 1.0) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )


def removal_costs(gram: Tensor, moment: Tensor, units: int) -> Tensor:
    """Computes the error that each unit adds when units are removed one at a time, the cheapest first.

    A unit S (a head's columns, or a neuron's one column) costs `Σ_i W_iS ((H⁻¹)_SS)⁻¹ W_iSᵀ`. The other weights are
    refitted by `δ = -W_S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,:`, and Gaussian elimination removes S from `H⁻¹` (Kurtic et al. 2023,
    arXiv:2302.04089, eq. 2 and 3). `WᵀW` is enough in place of `W`, or `WᵀGW` if outputs are weighted by `G`: the best
    refit does not depend on the weighting. Updates of both matrices are collected over several columns, so that
    thousands of units cost few matrix products; each choice still uses exact values.

    Args:
        gram: `WᵀW` or `WᵀGW`, `(width, width)`, in float64; it is overwritten.
        moment: Damped second moment of the inputs, `(width, width)`.
        units: The number of units, of equal width, side by side.

    Returns:
        `(units,)`, ascending in the order of removal: a unit that costs less than an earlier one gets the earlier cost.
    """
    import torch

    if units == 0:
        return gram.new_zeros(0)
    state = _Elimination(gram, moment, units)
    costs = gram.new_zeros(units)
    highest = costs.new_zeros(())
    for rank in range(units):
        unit, cost = state.remove_cheapest()
        highest = torch.maximum(highest, cost)
        # Equal costs keep the order of removal, in float32 too.
        costs[unit] = highest * (1 + 2e-7 * rank)
    return costs


class _Elimination:
    """Gaussian elimination of units from `inverse`, H⁻¹, and `gram`, WᵀW.

    Pending updates are still to be subtracted: `left rightᵀ` from `inverse`, `half leftᵀ + left halfᵀ` from `gram`.
    """

    def __init__(self, gram: Tensor, moment: Tensor, units: int) -> None:
        import torch

        self.units, self.width = units, len(gram) // units
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        self.gram = gram
        self.diagonal, self.squares = self._blocks(self.inverse), self._blocks(self.gram)
        self.gone = torch.zeros(units, dtype=torch.bool, device=gram.device)
        room = max(_PENDING // self.width, 1) * self.width
        self.left, self.right, self.half = (gram.new_zeros(len(gram), room) for _ in range(3))
        self.used = 0

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Returns the diagonal blocks of the units, `(units, width, width)`."""
        tiles = matrix.unflatten(0, (self.units, self.width)).unflatten(2, (self.units, self.width))
        return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def remove_cheapest(self) -> tuple[int, Tensor]:
        """Removes the unit with the lowest cost; returns its index and its cost."""
        import torch

        costs = torch.linalg.solve(self.diagonal, self.squares).diagonal(dim1=1, dim2=2).sum(-1)
        unit = int(costs.masked_fill(self.gone, torch.inf).argmin())
        cost = costs[unit].clamp(min=0)
        self._eliminate(unit)
        return unit, cost

    def _eliminate(self, unit: int) -> None:
        import torch

        rows = slice(unit * self.width, (unit + 1) * self.width)
        left, right, half = (x[:, : self.used] for x in (self.left, self.right, self.half))
        column = self.inverse[:, rows] - left @ right[rows].T
        products = self.gram[:, rows] - half @ left[rows].T - left @ half[rows].T
        factor = torch.linalg.solve(column[rows], column.T).T
        halved = products - factor @ products[rows] / 2
        now = slice(self.used, self.used + self.width)
        self.left[:, now], self.right[:, now], self.half[:, now] = factor, column, halved
        self.used += self.width
        by_unit = [x.unflatten(0, (self.units, self.width)) for x in (factor, column, halved)]
        self.diagonal -= by_unit[0] @ by_unit[1].mT
        crossed = by_unit[2] @ by_unit[0].mT
        self.squares -= crossed + crossed.mT
        self.gone[unit] = True
        # The block of a removed unit is zero except for rounding, and must stay invertible.
        self.diagonal[unit] = torch.eye(self.width, dtype=column.dtype, device=column.device)
        if self.used == self.left.shape[1]:
            self._apply_pending()

    def _apply_pending(self) -> None:
        self.inverse -= self.left @ self.right.T
        crossed = self.half @ self.left.T
        self.gram -= crossed + crossed.T
        self.used = 0


def refit_columns(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Refits the kept columns of a weight to the output of all columns: `W H[:,K] (H[K,K])⁻¹`; the others become 0.

    Removing the other columns one at a time gives the same result, in any order.

    Args:
        weight: `(outputs, width)`.
        moment: Damped second moment of the inputs, `(width, width)`.
        kept: Indices of the columns that stay.
    """
    import torch

    result = torch.zeros_like(weight, dtype=torch.float64)
    wanted = weight.detach().double() @ moment[:, kept]
    result[:, kept] = torch.cholesky_solve(wanted.T, torch.linalg.cholesky(moment[kept][:, kept])).T
    return result


def sparsify_weight(weight: Tensor, moment: Tensor, pattern: SparsityPattern) -> Tensor:
    """Sets weights to zero by a pattern, column after column, and corrects the columns to the right (SparseGPT).

    Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1: with `U` the upper Cholesky factor of `H⁻¹`, the weights
    with the lowest `w² / U_jj²` become zero. They are selected for 128 columns at a time, or for each group of
    `n_of_m`. The error `w / U_jj` of column `j` times `U_j,k` is subtracted from each column `k > j`.

    Args:
        weight: `(outputs, width)`; the pattern must divide it.
        moment: Damped second moment of the inputs, `(width, width)`.
        pattern: The number and the places of the zeros; the scope `global` is treated as `layer`.
    """
    import torch

    found = weight.detach().double().clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    upper = torch.linalg.cholesky(inverse, upper=True)
    by_row, tile = (True, (1, 1)) if pattern.n_of_m else (pattern.scope == "row", pattern.block)
    step = pattern.n_of_m[1] if pattern.n_of_m else max(_PENDING // tile[1], 1) * tile[1]
    for begin in range(0, found.shape[1], step):
        end = min(begin + step, found.shape[1])
        saliency = (found[:, begin:end] / upper.diagonal()[begin:end]) ** 2
        gone = select_lowest(saliency, tile, pattern.zeros, by_row)
        errors = torch.zeros_like(saliency)
        for column in range(begin, end):
            lost = torch.where(gone[:, column - begin], found[:, column], 0.0)
            errors[:, column - begin] = lost / upper[column, column]
            found[:, column:end] -= errors[:, column - begin].outer(upper[column, column:end])
        found[:, begin:end].masked_fill_(gone, 0)
        found[:, end:] -= errors @ upper[begin:end, end:]
    return found
