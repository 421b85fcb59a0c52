"""The logger, and the only code that writes to the terminal; it makes strings from outside safe to print."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from textwrap import fill
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hfcompress.utils.escape import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

FILE_WIDTH = 160
"""Width, in columns, of a table in a file or a pipe."""
TEXT_WIDTH = 100
"""Width, in columns, of a paragraph on a terminal at most."""


def _console(**options: Any) -> Console:
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """A console that prints only its own control characters: colours, newlines, tabs."""

        def render_str(self, text: str, *args: Any, **kwargs: Any) -> Any:
            # This happens before the layout, so that the columns of a table fit the text.
            return super().render_str(printable(text), *args, **kwargs)

        def render(self, *args: Any, **kwargs: Any) -> Any:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return SafeConsole(highlight=False, soft_wrap=True, emoji=False, markup=False, **options)


@cache
def out() -> Console:
    """Returns the console for results, on standard output."""
    console = _console()
    return console if console.is_terminal else _console(width=FILE_WIDTH)


@cache
def err() -> Console:
    """Returns the console for progress and errors, on standard error."""
    return _console(stderr=True)


def print_text(text: str) -> None:
    """Prints a paragraph: broken between words on a terminal, as one line in a file or a pipe."""
    console = out()
    if console.is_terminal:
        text = fill(printable(text), min(console.width, TEXT_WIDTH), break_long_words=False, break_on_hyphens=False)
    console.print(text)


def print_table(table: Table) -> None:
    """Prints a table at its full width, so that no cell is cut off."""
    from rich.measure import Measurement

    console, before = out(), out().width
    wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(wanted, 1)  # `print` takes no width above the console's
    try:
        console.print(table, crop=False)
    finally:
        console.width = before


log = logging.getLogger("hfcompress")
"""Logs what the package does. Messages below WARNING are shown only if the program asks; the command line does."""


def _is_first_process(_record: logging.LogRecord) -> bool:
    """True on the first process of a distributed run: the others do the same work and would log the same lines."""
    return os.environ.get("RANK", "0") == "0"


log.addFilter(_is_first_process)


@cache
def info_once(message: str) -> None:
    """Logs a message the first time only."""
    log.info(message)


class TerminalHandler(logging.Handler):
    """Prints log lines through `err()`.

    `rich.logging.RichHandler` lays each line out in a table, which breaks long lines at 80 columns in a file or a pipe.
    """

    def emit(self, record: logging.LogRecord) -> None:
        urgent = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if urgent else ""
        err().print(prefix + record.getMessage(), style="yellow" if urgent else None)


@contextmanager
def log_to_terminal() -> Iterator[None]:
    """Shows progress and warnings on standard error while the block runs; for the command line."""
    if any(isinstance(handler, TerminalHandler) for handler in log.handlers):
        yield
        return
    handler, level, propagate = TerminalHandler(), log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a library may have set up the root logger, and would print each line again
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


class _SafeRecord(logging.LogRecord):
    """A log record of any library, made safe to print: it may quote a file or a server."""

    def getMessage(self) -> str:  # noqa: N802  logging's name
        return printable(super().getMessage())


def guard_terminal() -> None:
    """Makes logs and warnings of libraries safe to print too; for the command line, which owns its process."""
    logging.setLogRecordFactory(_SafeRecord)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: printable(plain(*args, **kwargs))


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of a bug, as a `sys.excepthook`; its message may quote a file or a server."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
