"""The costs of heads and neurons, and the cost that pruning must reach. Arithmetic, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """The costs of heads and neurons, all in MACs, parameters, bytes or nanoseconds.

    Attributes:
        heads: For each layer's weights, the cost of keeping 0, 1, 2, … head groups.
        neurons: For each layer's weights, the cost of keeping 0, 1, 2, … groups of `group` neurons.
        group: The number of neurons that are kept or cut together.
        fixed: The cost of everything else.
    """

    heads: tuple[tuple[float, ...], ...]
    neurons: tuple[tuple[float, ...], ...]
    group: int = 1
    fixed: float = 0.0

    @property
    def whole(self) -> float:
        """The cost of keeping everything."""
        return self.fixed + sum(block[-1] for block in (*self.heads, *self.neurons))


@dataclass(frozen=True)
class Target:
    """The cost that pruning must reach.

    Attributes:
        costs: The costs of heads and neurons.
        budget: The largest cost that the pruned model may have, in the unit of `costs`.
        heads: The fewest head groups that a layer keeps; a layer that has fewer keeps all.
        neurons: The fewest neurons that a layer keeps, rounded up to whole groups; a layer that has fewer keeps all.
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
