"""The one place that writes to the terminal."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


@cache
def out() -> Console:
    """Results, on standard output."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, emoji=False)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, emoji=False, width=FILE_WIDTH)


@cache
def err() -> Console:
    """Progress and errors, on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def print_table(table: Table) -> None:
    """A table at its full width: a cell that is cut off is of no use to anyone."""
    from rich.measure import Measurement

    console, before = out(), out().width
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(wanted, 1)  # `print` takes no width above the console's
    try:
        console.print(table, crop=False)
    finally:
        console.width = before


def say(message: str, **style: Any) -> None:
    """One line of progress; silent on every process but the first of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        err().print(message, markup=False, **style)


@cache
def say_once(message: str) -> None:
    """Says a thing that is found again and again, the first time."""
    say(message)
