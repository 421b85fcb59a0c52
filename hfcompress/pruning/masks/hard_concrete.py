"""Hard-concrete gates, which a Lagrangian trains to a budget."""

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
"""γ and ζ: the concrete distribution is stretched to this interval before it is clamped to 0 and 1."""
EPSILON = 1e-6
LIMIT = math.log(1e2)
"""The largest |log α|, so that a gate that is almost open or closed can still change."""
SOFTNESS = 0.8
"""CoFi's factor in the gates of units that stay."""


@dataclass(frozen=True)
class L0Settings:
    """The settings of hard-concrete gates.

    Attributes:
        learning_rate: Learning rate of log α.
        multiplier_learning_rate: Learning rate of the Lagrange multipliers.
        warmup: Share of the steps over which the target falls from the whole model to the budget.
        temperature: β.
        heads, neurons: log α at the start; blocks start like heads.
    """

    learning_rate: float
    multiplier_learning_rate: float
    warmup: float
    temperature: float
    heads: float
    neurons: float


class HardConcrete(UnitMasks):
    """`z = clamp(s (ζ - γ) + γ, 0, 1)`, `s = σ((log u - log(1 - u) + log α) / β)` (Louizos et al. 2018, eq. 10 to 12).

    If the target allows whole blocks to be cut, each block has a gate too, and a unit's gate is the product of both
    (CoFi, section 3.1). The penalty is `λ₁ (s - t) + λ₂ (s - t)²`; log α minimizes it, and both λ maximize it. `s` is
    the expected share of the units' costs that is saved, and `t` the share to save at this step (CoFi, section 3.1).
    """

    def __init__(self, model: PreTrainedModel, target: Target, settings: L0Settings) -> None:
        super().__init__(model)
        self.target, self.settings = target, settings
        blocks = len(self.heads)
        self.sizes = [sum(self.heads), sum(self.neurons), blocks * (target.heads == 0), blocks * (target.neurons == 0)]
        starts = (settings.heads, settings.neurons, settings.heads, settings.heads)
        start = torch.cat([torch.full((n,), float(at)) for n, at in zip(self.sizes, starts, strict=True)])
        noise = torch.randn(len(start), generator=torch.Generator().manual_seed(0))
        self.log_alpha = nn.Parameter(start + 1e-2 * noise)
        self.multipliers = nn.Parameter(torch.zeros(2))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Makes the groups of log α and of the multipliers: constant rates, no weight decay, as in CoFi's code."""
        return [
            {"params": [self.log_alpha], "lr": self.settings.learning_rate, "weight_decay": 0.0, STEADY: True},
            {
                "params": [self.multipliers],
                "lr": self.settings.multiplier_learning_rate,
                "weight_decay": 0.0,
                "maximize": True,
                STEADY: True,
            },
        ]

    def gates(self, progress: float) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Samples gates in training mode; in eval mode returns soft values for units that stay, and 0 for others."""
        if self.training:
            u = self.noise(len(self.log_alpha), progress).clamp(EPSILON, 1 - EPSILON).to(self.log_alpha)
            s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / self.settings.temperature)
            return self._multiply_by_blocks((s * (HIGH - LOW) + LOW).clamp(0, 1))
        heads, neurons = self._multiply_by_blocks(torch.sigmoid(self.log_alpha / self.settings.temperature * SOFTNESS))
        head_gates, neuron_gates = self.gates_of(self._select_units(progress))
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
        wanted = ease_target(self.target, self._share_done(progress)).budget
        ahead = (wanted - expected) / (costs.whole - costs.fixed)
        return self.multipliers[0] * ahead + self.multipliers[1] * ahead**2

    def after_step(self, model: PreTrainedModel, step: int, steps: int) -> None:
        with torch.no_grad():
            self.log_alpha.clamp_(-LIMIT, LIMIT)

    def keep(self) -> list[Keep]:
        return self._select_units(1.0)

    def probabilities(self) -> tuple[list[Tensor], list[Tensor]]:
        """Computes `P(z ≠ 0) = σ(log α - β log(-γ / ζ))` of each head and neuron, a tensor for each layer's weights."""
        return self._multiply_by_blocks(
            torch.sigmoid(self.log_alpha - self.settings.temperature * math.log(-LOW / HIGH))
        )

    def _select_units(self, progress: float) -> list[Keep]:
        return keep_highest(*self.probabilities(), ease_target(self.target, self._share_done(progress)))

    def _share_done(self, progress: float) -> float:
        return min(progress / self.settings.warmup, 1.0) if self.settings.warmup else 1.0

    def _multiply_by_blocks(self, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Multiplies the values of units by the value of their block, if blocks have gates."""
        heads, neurons, attention, ffn = values.split(self.sizes)
        by_layer = self.split(torch.cat([heads, neurons]))
        return _times(by_layer[0], attention), _times(by_layer[1], ffn)


def _times(units: list[Tensor], blocks: Tensor) -> list[Tensor]:
    return [z * block for z, block in zip(units, blocks, strict=True)] if len(blocks) else units
