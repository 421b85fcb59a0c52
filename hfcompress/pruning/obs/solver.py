"""Optimal Brain Surgeon on one linear layer: what it costs to lose inputs or weights, and how the rest takes over.

The error is that of the layer's output, `tr(ΔW H ΔWᵀ)`, with `H` the second moment of its inputs (Hassibi & Stork
1993). Everything is exact for that quadratic, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.pruning.sparsity import lowest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfcompress.pruning.sparsity_pattern import Pattern

DAMPING = 0.01
"""What is added to the diagonal of a second moment, as a share of its mean (Frantar & Alistarh 2023, section 4)."""
_PENDING = 128


class Moments:
    """Sums over the inputs of a linear layer: their outer products, themselves, their number."""

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
        """The sums, to be added up over processes."""
        return [self.products, self.inputs, self.count]

    @property
    def mean(self) -> Tensor:
        """The mean input, `(width,)`."""
        return self.inputs / self.count.clamp(min=1)

    def second(self) -> Tensor:
        """The damp mean of `x xᵀ`, `(width, width)`."""
        return damp(self.products / self.count.clamp(min=1))

    def around_mean(self) -> Tensor:
        """The damp second moment of what a bias cannot make up for: around the mean, where there is a bias."""
        if self.module.bias is None:
            return self.second()
        return damp(self.products / self.count.clamp(min=1) - self.mean.outer(self.mean))


def damp(moment: Tensor) -> Tensor:
    """Adds `DAMPING` times the mean diagonal to the diagonal of a second moment; inputs that are always 0 get 1."""
    import torch

    added = DAMPING * moment.diagonal().mean().clamp(min=0) if len(moment) else moment.new_zeros(())
    return moment + torch.where(added > 0, added, 1.0) * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )


def removal_costs(gram: Tensor, moment: Tensor, units: int) -> Tensor:
    """Computes what each unit adds to the error when units are removed one at a time, the cheapest first.

    A unit S (a head's columns, a neuron's one) costs `Σ_i W_iS ((H⁻¹)_SS)⁻¹ W_iSᵀ`; the rest takes over by
    `δ = -W_S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S,:`, and Gaussian elimination takes S out of `H⁻¹` (Kurtic et al. 2023,
    arXiv:2302.04089, eq. 2 and 3). Of `W` only `WᵀW` is needed, or `WᵀGW` where outputs count by `G`: what is best for
    the rest does not depend on it. Changes to both matrices wait until some columns of them are together, so that
    thousands of units cost some matrix products; each choice is made on exact values.

    Args:
        gram: `WᵀW` or `WᵀGW`, `(width, width)`, in float64; it is used up.
        moment: Damped second moment of the inputs, `(width, width)`.
        units: Units of equal width, side by side.

    Returns:
        `(units,)`, rising in the order of removal: where a later unit costs less than one before it (together they do
        more than each alone), it costs as much.
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
    """`inverse` is H⁻¹ and `gram` WᵀW, less what is pending: `left rightᵀ`, and `half leftᵀ + left halfᵀ`."""

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
        """The diagonal blocks of the units, `(units, width, width)`."""
        tiles = matrix.unflatten(0, (self.units, self.width)).unflatten(2, (self.units, self.width))
        return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()

    def remove_cheapest(self) -> tuple[int, Tensor]:
        """Takes the unit out that costs least; its number and its cost."""
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
        # The block of what is gone is zero but for rounding; it must stay invertible.
        self.diagonal[unit] = torch.eye(self.width, dtype=column.dtype, device=column.device)
        if self.used == self.left.shape[1]:
            self._settle()

    def _settle(self) -> None:
        self.inverse -= self.left @ self.right.T
        crossed = self.half @ self.left.T
        self.gram -= crossed + crossed.T
        self.used = 0


def refit_columns(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Refits the kept columns of a weight to give what all gave: `W H[:,K] (H[K,K])⁻¹`; the other columns are 0.

    That is where removing the others one at a time ends, in any order.

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


def sparsify_weight(weight: Tensor, moment: Tensor, pattern: Pattern) -> Tensor:
    """Sets weights to zero by a pattern, column after column; the columns to the right take over (SparseGPT).

    Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1: with `U` the upper Cholesky factor of `H⁻¹`, weights of the
    lowest `w² / U_jj²` become zero, chosen for 128 columns at a time (for each group, of `n_of_m`), and the error
    `w / U_jj` of column `j` times `U_j,k` is taken off column `k > j`.

    Args:
        weight: `(outputs, width)`; the pattern tiles it.
        moment: Damped second moment of the inputs, `(width, width)`.
        pattern: How many, and where; `global` is `layer` here.
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
        gone = lowest(saliency, tile, pattern.zeros, by_row)
        errors = torch.zeros_like(saliency)
        for column in range(begin, end):
            lost = torch.where(gone[:, column - begin], found[:, column], 0.0)
            errors[:, column - begin] = lost / upper[column, column]
            found[:, column:end] -= errors[:, column - begin].outer(upper[column, column:end])
        found[:, begin:end].masked_fill_(gone, 0)
        found[:, end:] -= errors @ upper[begin:end, end:]
    return found
