"""A candidate: a point of the search space, and the stages that make it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MACS = (1.0, 0.67, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
"""Shares of the layers' MACs that may stay, from the whole model down; neighbours differ by a quarter or so."""
STEPS = (0, 150, 600, 2400)
"""Optimizer steps of the recovery after the cut, each four times those before (successive halving, Jamieson &
Talwalkar 2016, arXiv:1502.07943); 0 leaves the refit in closed form as it is."""
EPOCHS = 30
"""The most passes over the train split that a recovery takes."""
SCORING_ROWS = 2048
"""Rows that `obs` scores on, as in docs/results.md."""
BATCH = 32
CACHED = 600
"""Steps from which the source's answers are kept on disk."""


def list_steps(rows: int) -> list[int]:
    """Lists the numbers of steps that are tried with a train split of so many rows, from 0 up."""
    most = max(EPOCHS * rows // BATCH, 1)
    return [steps for steps in STEPS if steps <= most] if most >= STEPS[1] else [0, most]


@dataclass(frozen=True, order=True)
class Candidate:
    """A point of the search space.

    Attributes:
        backend: The quantization backend that makes the final graph.
        macs: The share of the layers' MACs that stays; 1 cuts nothing.
        steps: Optimizer steps of the recovery.
        vocabulary: `corpus` to keep only the tokens that occur in the data, else `keep`.
    """

    backend: str
    macs: float = 1.0
    steps: int = 0
    vocabulary: str = "keep"

    def to_json(self) -> dict[str, Any]:
        """The candidate as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.macs:.0%} of the MACs"] if self.macs < 1 else []
        parts += [f"{self.steps:,} steps"] if self.steps else []
        parts += ["words of the data"] if self.vocabulary == "corpus" else []
        return ", ".join([*parts, self.backend])

    def stages(self, rows: int, precision: str = "auto") -> list[dict[str, Any]]:
        """The stages of a recipe that makes this model from the source.

        Args:
            rows: Rows of the train split.
            precision: The precision of the training.
        """
        stages: list[dict[str, Any]] = []
        cut: dict[str, Any] = {}
        if self.macs < 1:
            cut |= {"criterion": {"use": "obs", "rows": min(SCORING_ROWS, rows)}}
            cut |= {"budget": {"macs": self.macs}, "empty_blocks": True}
        if self.vocabulary == "corpus":
            cut |= {"vocabulary": "corpus"}
        if self.steps:
            cut |= {"recover": _recover(self, precision)}
        if cut:
            stages.append({"kind": "prune", **cut})
        return [*stages, {"kind": "quantize", "backend": self.backend}]


def _recover(candidate: Candidate, precision: str) -> dict[str, Any]:
    """The training after the cut: a deeper cut starts worse, and takes a larger rate (docs/results.md)."""
    return {
        "teacher": "source",
        "losses": [{"use": "soft_labels", "temperature": 2.0}],
        "max_steps": candidate.steps,
        "learning_rate": 3e-5 if candidate.macs >= 0.25 else 1e-4,
        "batch_size": BATCH,
        "precision": precision,
        # The trials with many steps ask the source for the same rows: it answers once, for all of them.
        "teacher_cache": "logits" if candidate.steps >= CACHED else "auto",
    }
