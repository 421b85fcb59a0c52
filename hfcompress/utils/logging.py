"""The one place that writes to the terminal, where every string that others wrote is made safe to print."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hfcompress.utils.escape import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""


def _console(**options: Any) -> Console:
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """A console that prints no control character but its own: colours, newlines, tabs."""

        def render_str(self, text: str, *args: Any, **kwargs: Any) -> Any:
            # Before the layout, so that the columns of a table fit what is shown.
            return super().render_str(printable(text), *args, **kwargs)

        def render(self, *args: Any, **kwargs: Any) -> Any:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return SafeConsole(highlight=False, soft_wrap=True, emoji=False, markup=False, **options)


@cache
def out() -> Console:
    """Results, on standard output."""
    console = _console()
    return console if console.is_terminal else _console(width=FILE_WIDTH)


@cache
def err() -> Console:
    """Progress and errors, on standard error."""
    return _console(stderr=True)


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
        err().print(message, **style)


@cache
def say_once(message: str) -> None:
    """Says a thing that is found again and again, the first time."""
    say(message)


class _SafeRecord(logging.LogRecord):
    """What any library logs: it may quote a file or a server."""

    def getMessage(self) -> str:  # noqa: N802  logging's name
        return printable(super().getMessage())


def guard_terminal() -> None:
    """Makes what libraries log and warn of safe to print as well; for the command line, which owns its process."""
    logging.setLogRecordFactory(_SafeRecord)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(plain(*args, **kwargs))


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`: the traceback of a bug, whose message may quote a file or a server."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
