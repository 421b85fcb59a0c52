"""A search landscape with a known optimum, in place of models: losses and speeds are formulas of the candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfcompress.searching.candidate import MACS, STEPS, Candidate
from hfcompress.searching.outcome import Outcome
from hfcompress.searching.race import Verdict
from hfcompress.utils.errors import HfcompressError


@dataclass(frozen=True)
class Layer:
    heads: int
    ffn: int


@dataclass(frozen=True)
class Shape:
    layers: tuple[Layer, ...] = (Layer(4, 64),)


@dataclass(frozen=True)
class Model:
    candidate: Candidate
    disk_bytes: int
    shape: Shape = Shape()


@dataclass
class Landscape:
    """Makes models whose loss grows as MACs go and shrinks with steps; seconds pass on a clock of its own.

    Attributes:
        margin: The loss that is accepted.
        broken: Candidates whose trial fails, and how often.
        stop_after: Raises KeyboardInterrupt in the trial after so many; None for no kill.
    """

    margin: float = 0.02
    broken: dict[Candidate, int] = field(default_factory=dict)
    stop_after: int | None = None
    made: list[Candidate] = field(default_factory=list)
    now: float = 0.0

    def clock(self) -> float:
        return self.now

    def make(self, candidate: Candidate) -> Any:
        if self.stop_after is not None and len(self.made) >= self.stop_after:
            raise KeyboardInterrupt
        self.made.append(candidate)
        self.now += 20 + candidate.steps / 10
        if self.broken.get(candidate, 0):
            self.broken[candidate] -= 1
            raise HfcompressError("the disk is full")
        size = 1000 if candidate.vocabulary == "keep" else 600
        return Model(candidate, round(size * (0.5 + candidate.macs / 2)))

    def judge(self, model: Any) -> Verdict:
        drop = find_loss(model.candidate)
        return Verdict(drop + 0.001 <= self.margin, drop, drop - 0.001, drop + 0.001, 1000)

    def time(self, model: Any) -> Mapping[int, Sequence[float]]:
        speed = find_speed(model.candidate)
        return {1: (speed, speed * 0.99, speed * 1.01), 32: (speed, speed * 0.99, speed * 1.01)}


def find_loss(candidate: Candidate) -> float:
    depth = MACS.index(candidate.macs) if candidate.macs in MACS else MACS.index(0.2) + 0.5
    repaired = STEPS.index(candidate.steps) if candidate.steps in STEPS else 0
    return max(0.001, 0.006 * (depth - 1.3 * repaired))


def find_speed(candidate: Candidate) -> float:
    return {"fast": 4.0, "slow": 2.0}[candidate.backend] / (0.1 + 0.9 * candidate.macs)


def list_all() -> list[Candidate]:
    """Every candidate on the ladder."""
    words = ("keep", "corpus")
    return [
        Candidate(backend, macs, steps, vocabulary)
        for backend in ("fast", "slow") for macs in MACS for steps in STEPS for vocabulary in words
    ]  # fmt: skip


def find_optimum(margin: float) -> float:
    """The largest speed of all candidates on the ladder that keep to the margin."""
    return max(find_speed(x) for x in list_all() if find_loss(x) + 0.001 <= margin)


def names(outcomes: Sequence[Outcome]) -> list[Candidate]:
    return [outcome.candidate for outcome in outcomes]
