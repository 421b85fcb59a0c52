"""Models that are measured and verified in this process, without the seconds that a fresh one takes to import torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hfcompress.measure.process import ModelProcess
from hfcompress.measure.worker import Worker, answer

USERS = (
    "measure.measure",
    "measure.verify",
    "searching.workshop",
    "quantization.mixed_precision",
    "pruning.convert.convert",
)


class _Served:
    """Stands in for the `Popen` of a worker: it reads requests and writes answers, and is nobody's child."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.worker, self.answers, self.pid, self.closed = Worker(), list[str](), os.getpid(), False
        self.stdin = self.stdout = self

    def write(self, line: str) -> None:
        self.answers.append(answer(self.worker, line))

    def flush(self) -> None:
        """An answer is there at once."""

    def readline(self) -> str:
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed = True

    def wait(self, timeout: float) -> int:
        return 0


class InThisProcess(ModelProcess):
    """A `ModelProcess` whose worker lives here."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        with mock.patch("hfcompress.measure.process.subprocess.Popen", _Served):
            super().__init__(*arguments, **options)

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        if "trust" in request:  # the code that travels with a pruned model is imported here already
            assert self.artifact.is_pruned or not request["trust"]
            request |= {"trust": False, "register": None}
        return super()._ask(what, **request)


@contextmanager
def in_this_process() -> Iterator[None]:
    """Measures and verifies here; that it is done in fresh processes is tested in test_run.py and tests/measure."""
    with ExitStack() as stack:
        for module in USERS:
            stack.enter_context(mock.patch(f"hfcompress.{module}.ModelProcess", InThisProcess))
        yield
