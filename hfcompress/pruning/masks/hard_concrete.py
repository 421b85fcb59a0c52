"""Gates that are learned towards a size: hard-concrete distributions under a Lagrangian."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hfcompress.pruning.allocation import keep_highest
from hfcompress.pruning.masks.units import UnitMasks, ease_target, expect_cost
from hfcompress.training.overlay import STEADY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep
    from hfcompress.pruning.costs import Target

LOW, HIGH = -0.1, 1.1
"""γ and ζ: the concrete distribution is stretched to them before it is cut off at 0 and 1."""
EPSILON = 1e-6
LIMIT = math.log(1e2)
"""The largest |log α|: a gate that is nearly decided can still change its mind."""
SOFTNESS = 0.8
"""CoFi's factor in the gate of what stays."""


@dataclass(frozen=True)
class Learning:
    """How gates are learned.

    Attributes:
        learning_rate: Of log α.
        multiplier_learning_rate: Of the Lagrange multipliers.
        warmup: Share of the steps over which the target falls from everything to the budget.
        temperature: β.
        heads, neurons: log α at the start; that of whole blocks is that of heads.
    """

    learning_rate: float
    multiplier_learning_rate: float
    warmup: float
    temperature: float
    heads: float
    neurons: float


class HardConcrete(UnitMasks):
    """`z = clamp(s (ζ - γ) + γ, 0, 1)`, `s = σ((log u - log(1 - u) + log α) / β)` (Louizos et al. 2018, eq. 10 to 12).

    Where the target lets a block die, it has a gate of its own, and the gate of a unit is the product of the two
    (CoFi, section 3.1). The loss gains `λ₁ (s - t) + λ₂ (s - t)²`, which log α lowers and both λ raise: `s` is the
    share of the units' costs that is expected to be saved, `t` what is to be saved by now (CoFi, section 3.1).
    """

    def __init__(self, model: PreTrainedModel, target: Target, learning: Learning) -> None:
        super().__init__(model)
        self.target, self.learning = target, learning
        blocks = len(self.heads)
        self.sizes = [sum(self.heads), sum(self.neurons), blocks * (target.heads == 0), blocks * (target.neurons == 0)]
        starts = (learning.heads, learning.neurons, learning.heads, learning.heads)
        start = torch.cat([torch.full((n,), float(at)) for n, at in zip(self.sizes, starts, strict=True)])
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0))
        self.log_alpha = nn.Parameter(start + 1e-2 * noise)
        self.multipliers = nn.Parameter(torch.zeros(2))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Both without weight decay and at a constant rate, as in CoFi's code; the multipliers climb."""
        return [
            {"params": [self.log_alpha], "lr": self.learning.learning_rate, "weight_decay": 0.0, STEADY: True},
            {
                "params": [self.multipliers],
                "lr": self.learning.multiplier_learning_rate,
                "weight_decay": 0.0,
                "maximize": True,
                STEADY: True,
            },
        ]

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Sampled in training; else soft values where units stay, and 0."""
        if self.training:
            u = self.noise(len(self.log_alpha), progress).clamp(EPSILON, 1 - EPSILON).to(self.log_alpha)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / self.learning.temperature)
            return self._products((s * (HIGH - LOW) + LOW).clamp(0, 1))
        heads, neurons = self._products(torch.sigmoid(self.log_alpha / self.learning.temperature * SOFTNESS))
        head_gates, neuron_gates = self.gates_of(self._kept(progress))
        return (
            [z * gate.to(z) for z, gate in zip(heads, head_gates, strict=True)],
            [z * gate.to(z) for z, gate in zip(neurons, neuron_gates, strict=True)],
        )

    def penalty(self, progress: float) -> Tensor:
        costs, least = self.target.costs, self.target.least
        heads, neurons = self.probabilities()
        expected = expect_cost(
            costs,
            [p.sum().clamp(min=n) for p, n in zip(heads, least[0], strict=True)],
            [p.sum().clamp(min=n * costs.group) for p, n in zip(neurons, least[1], strict=True)],
        )
        wanted = ease_target(self.target, self._done(progress)).budget
        ahead = (wanted - expected) / (costs.whole - costs.fixed)
        return self.multipliers[0] * ahead + self.multipliers[1] * ahead**2

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        with torch.no_grad():
            self.log_alpha.clamp_(-LIMIT, LIMIT)

    def keep(self) -> list[Keep]:
        return self._kept(1.0)

    def probabilities(self) -> tuple[list[Tensor], list[Tensor]]:
        """`P(z ≠ 0) = σ(log α - β log(-γ / ζ))` of each head and each neuron, one tensor for each layer's weights."""
        return self._products(torch.sigmoid(self.log_alpha - self.learning.temperature * math.log(-LOW / HIGH)))

    def _kept(self, progress: float) -> list[Keep]:
        return keep_highest(*self.probabilities(), ease_target(self.target, self._done(progress)))

    def _done(self, progress: float) -> float:
        return min(progress / self.learning.warmup, 1.0) if self.learning.warmup else 1.0

    def _products(self, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What belongs to units, each times what belongs to its block where that has a gate."""
        heads, neurons, attention, ffn = values.split(self.sizes)
        by_layer = self.split(torch.cat([heads, neurons]))
        return _times(by_layer[0], attention), _times(by_layer[1], ffn)


def _times(units: list[Tensor], blocks: Tensor) -> list[Tensor]:
    return [z * block for z, block in zip(units, blocks, strict=True)] if len(blocks) else units
