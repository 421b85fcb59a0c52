"""The one place that writes to the terminal."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@cache
def out() -> Console:
    """Results, on standard output."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@cache
def err() -> Console:
    """Progress and errors, on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str, **style: Any) -> None:
    """One line of progress; silent on every process but the first of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        err().print(message, markup=False, **style)
