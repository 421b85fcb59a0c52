"""Models that are measured and verified in this process, without the seconds that a fresh one takes to import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hfcompress.measure.process import ModelProcess
from hfcompress.measure.worker import Worker

USERS = ("measure.measure", "measure.verify", "quantization.mixed_precision")


class InThisProcess(ModelProcess):
    """A `ModelProcess` whose worker lives here."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.worker = Worker()
        with mock.patch("hfcompress.measure.process.subprocess.Popen", return_value=None):
            super().__init__(*arguments, **options)

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        if "trust" in request:  # the code that travels with a pruned model is imported here already
            request |= {"trust": False, "register": None}
        found: dict[str, Any] = json.loads(json.dumps(getattr(self.worker, what)(**request)))
        return found

    def close(self) -> None:
        self._log.close()
        self._folder.cleanup()


@contextmanager
def in_this_process() -> Iterator[None]:
    """Measures and verifies here; that it is done in fresh processes is tested in test_run.py and tests/measure."""
    with ExitStack() as stack:
        for module in USERS:
            stack.enter_context(mock.patch(f"hfcompress.{module}.ModelProcess", InThisProcess))
        yield
