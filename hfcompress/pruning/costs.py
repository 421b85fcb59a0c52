"""What it costs to keep heads and neurons, and the cost that pruning must come down to. Arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What keeping so many units of each block costs, all in one unit: MACs, parameters, bytes or nanoseconds.

    Attributes:
        heads: For each layer's weights, the cost of keeping 0, 1, 2, … of its head groups.
        neurons: For each layer's weights, the cost of keeping 0, 1, 2, … groups of `group` neurons.
        group: Neurons that stay or go together.
        fixed: What everything else costs.
    """

    heads: tuple[tuple[float, ...], ...]
    neurons: tuple[tuple[float, ...], ...]
    group: int = 1
    fixed: float = 0.0

    @property
    def whole(self) -> float:
        """The cost of keeping everything."""
        return self.fixed + sum(block[-1] for block in (*self.heads, *self.neurons))

    def of(self, heads: tuple[int, ...], neurons: tuple[int, ...]) -> float:
        """The cost of keeping so many head groups and so many neurons of each layer; neurons in whole groups."""
        kept = [block[count] for block, count in zip(self.heads, heads, strict=True)]
        kept += [block[count // self.group] for block, count in zip(self.neurons, neurons, strict=True)]
        return self.fixed + sum(kept)


@dataclass(frozen=True)
class Target:
    """What pruning must come to.

    Attributes:
        costs: What units cost.
        budget: The most that what stays may cost, in the unit of `costs`.
        heads: The fewest head groups that a layer keeps, where it has as many.
        neurons: The fewest neurons that a layer keeps, in whole groups, where it has as many.
    """

    costs: Costs
    budget: float
    heads: int = 1
    neurons: int = 1

    @property
    def least(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The fewest head groups and the fewest neuron groups of each layer."""
        groups = -(-self.neurons // self.costs.group)
        return (
            tuple(min(self.heads, len(block) - 1) for block in self.costs.heads),
            tuple(min(groups, len(block) - 1) for block in self.costs.neurons),
        )
