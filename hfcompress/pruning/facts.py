"""The facts of a prune stage, for stage.json, report and card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class PruningFacts:
    """The facts of a prune stage so far; None if a fact does not apply.

    Attributes:
        training: The facts of the last training: the scores of the model and its teachers on the dev split.
        tuned: For each layer, attention before FFN: the block's squared error before and after mask tuning.
        vocabulary: The number of tokens that stay, and the number before.
        embedding_rank: `rank` of the word embeddings, and the share of their sum of squares that is `kept`.
        kept: For `heads`, `ffn`, `hidden` and `layers`, the number that stays and the number before.
        latency: For a budget of latency, its conditions, target, prediction and measurement.
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
        """Returns the facts as stage.json holds them, without those that are None."""
        own = {name: getattr(self, name) for name in _OWN}
        return {**self.training, **{name: value for name, value in own.items() if value is not None}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PruningFacts:
        """Reads the facts that `to_json` wrote."""
        own = {name: value for name, value in found.items() if name in _OWN}
        return cls({name: value for name, value in found.items() if name not in own}, **own)


_OWN = tuple(field.name for field in fields(PruningFacts) if field.name != "training")
