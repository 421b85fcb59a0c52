"""Pruning schedules: at once, in rounds, during training, or in rounds that go back to early weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hfcompress.models.bounds import LARGEST
from hfcompress.utils.strict_model import StrictModel

Curve = Literal["linear", "cubic"]


def share_done(curve: Curve, progress: float) -> float:
    """Computes the share of the cutting that is done after the share `progress` of its time.

    `cubic` is Zhu & Gupta 2017, arXiv:1710.01878, eq. 1: `1 - (1 - progress)³`, much at first and little at the end.
    """
    return progress if curve == "linear" else 1 - (1 - progress) ** 3


def share_done_between(curve: Curve, progress: float, begin: float, end: float) -> float:
    """Computes `share_done` for a cut that begins and ends at these shares of the training's steps."""
    return share_done(curve, min(max((progress - begin) / (end - begin), 0.0), 1.0))


@dataclass(frozen=True)
class GrowthTimes:
    """The steps of a training at which a cut grows, and the curve that it follows.

    Attributes:
        begin, end: Shares of the steps between which it grows.
        every: Steps from one growth to the next.
        curve: The curve.
    """

    begin: float
    end: float
    every: int
    curve: Curve

    def new_share(self, step: int, steps: int, share: float) -> float | None:
        """Computes the share of the cutting that is due after a step; None if the cut does not grow at this step."""
        progress = step / steps
        if step % self.every and progress < self.end:
            return None
        new = share_done_between(self.curve, progress, self.begin, self.end)
        return new if new > share else None


class OneShot(StrictModel):
    """Score, cut and recover, once."""

    use: Literal["one_shot"] = "one_shot"


class Iterative(StrictModel):
    """Score, cut and recover, round after round; each round cuts more, by new scores."""

    use: Literal["iterative"] = "iterative"
    rounds: int = Field(default=4, ge=2, le=LARGEST["rounds"])
    curve: Curve = "cubic"
    """The curve by which the cut grows over the rounds."""

    @property
    def shares(self) -> list[float]:
        """The shares of the cutting that are done after each round."""
        return [share_done(self.curve, number / self.rounds) for number in range(1, self.rounds + 1)]


class Gradual(StrictModel):
    """Close gates while the model trains (`train`), then cut the units that they closed."""

    use: Literal["gradual"] = "gradual"
    begin: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps before the first cut."""
    end: float = Field(default=0.7, gt=0, le=1)
    """Share of the steps after which nothing more is cut."""
    every: int = Field(default=50, ge=1)
    """Steps from one scoring to the next."""
    curve: Curve = "cubic"

    @model_validator(mode="after")
    def _require_order(self) -> Gradual:
        if self.begin >= self.end:
            raise ValueError(f"`begin` ({self.begin}) must come before `end` ({self.end})")
        return self


class Lottery(StrictModel):
    """Train, cut what matters least, reset the rest to its early weights, and train again.

    Source: Frankle & Carbin 2019, arXiv:1803.03635; rewinding to a step: Frankle et al. 2020, arXiv:1912.05671; on
    BERT: Chen et al. 2020, arXiv:2007.12223. `train` is the training of each round and of the last ticket.
    """

    use: Literal["lottery"] = "lottery"
    rounds: int = Field(default=3, ge=1, le=LARGEST["rounds"])
    rewind_steps: int = Field(default=0, ge=0)
    """The optimizer step to whose weights each round goes back; 0 is the model that the stage gets."""

    @property
    def shares(self) -> list[float]:
        """The shares of the cutting that are done after each round."""
        return [number / self.rounds for number in range(1, self.rounds + 1)]


def _name_to_mapping(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


_Options = Annotated[OneShot | Iterative | Gradual | Lottery, Field(discriminator="use")]
_Name = Literal["one_shot", "iterative", "gradual", "lottery"]
Schedule = Annotated[_Options, BeforeValidator(_name_to_mapping, json_schema_input_type=_Name | _Options)]
