"""Stops a command: after a first ^C or SIGTERM it cleans up, a second one ends it at once."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """The first signal that came; 0 before any signal."""

    signal: int = 0


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Turns the first signal into a KeyboardInterrupt; a second one ends the process at once.

    Nothing is lost: a run may be killed at any moment. Python drops an exception that is raised in a finalizer, such as
    `__del__`; then the KeyboardInterrupt is raised once more, just after it.
    """
    stop, report_unraisable = Stop(), sys.unraisablehook

    def handle(number: int, _frame: Any) -> None:
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        raise KeyboardInterrupt

    def raise_again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            report_unraisable(unraisable)
            return
        number, stop.signal = stop.signal or signal.SIGINT, 0
        threading.Timer(0.01, interrupt_main_thread, [number]).start()

    before = {}
    if threading.current_thread() is threading.main_thread():
        # A shell that starts a command in the background may tell it to ignore ^C.
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, handle) for number in heeded}
        sys.unraisablehook = raise_again
    try:
        yield stop
    finally:
        sys.unraisablehook = report_unraisable
        for number, handler in before.items():
            signal.signal(number, handler)
        atexit.register(_end_at_once, list(before))


def _end_at_once(numbers: list[signal.Signals]) -> None:
    """Lets a signal end the process without a traceback: at shutdown nothing is left to clean up."""
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def interrupt_main_thread(number: int = signal.SIGINT) -> None:
    """Raises a KeyboardInterrupt in the main thread, also while it waits; `number` is the signal."""
    if hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)
    else:
        _thread.interrupt_main()
