"""How a cut grows while a model trains."""

from __future__ import annotations

from typing import Literal

Curve = Literal["linear", "cubic"]


def done(curve: Curve, progress: float) -> float:
    """How much of the cutting is done, as a share of all of it, when `progress` of its time has gone by.

    `cubic` is Zhu & Gupta 2017, arXiv:1710.01878, eq. 1: `1 - (1 - progress)³`, much at first and little at the end.
    """
    return progress if curve == "linear" else 1 - (1 - progress) ** 3


def done_between(curve: Curve, progress: float, begin: float, end: float) -> float:
    """The same where the cutting begins and ends at these shares of the steps."""
    return done(curve, min(max((progress - begin) / (end - begin), 0.0), 1.0))
