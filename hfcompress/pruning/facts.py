"""What a prune stage finds out, for stage.json, report and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class PruningFacts:
    """What a prune stage found out so far; None where it did not look.

    Attributes:
        training: What the last training told: the scores of the model and its teachers on the dev split.
        tuned: For each layer, attention before FFN: the block's squared error before and after mask tuning.
        vocabulary: Tokens that stay, and tokens before.
        embedding_rank: `rank` of the word embeddings, and the share of their squares `kept`.
        kept: `heads`, `ffn`, `hidden` and `layers`: what stays, and what there was before.
        latency: The latency of the budget: conditions, target, prediction and measurement.
        sparsity: The share of zeros, and the bytes of dense and of sparse storage.
        sensitivity: The metric when one block alone loses units (`measure_sensitivity`).
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: Mapping[str, Any] | None = None
    tuned: Sequence[Sequence[float]] | None = None
    vocabulary: Sequence[int] | None = None
    embedding_rank: Mapping[str, float] | None = None
    kept: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    sparsity: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as stage.json keeps them; what was not looked at is left out."""
        own = {name: getattr(self, name) for name in _OWN}
        return {**self.training, **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PruningFacts:
        """The facts that `to_json` wrote."""
        own = {name: value for name, value in found.items() if name in _OWN}
        return cls({name: value for name, value in found.items() if name not in own}, **own)


_OWN = tuple(field.name for field in fields(PruningFacts) if field.name != "training")
