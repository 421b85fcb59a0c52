"""Counts the hours, and if asked the energy, that making a model takes, over all attempts at its stage."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hfcompress.measure.energy import Consumption, Meter, name_sources
from hfcompress.measure.environment import accelerator, cpu_name
from hfcompress.utils.distributed import process_state
from hfcompress.utils.files import read_json, write_text
from hfcompress.utils.logging import log

FILE = "effort.json"
"""The file with the sums so far, in a stage's working directory."""
INTERVAL = 15.0
"""Seconds between two writings: a killed attempt loses at most these."""


@dataclass(frozen=True)
class Sums:
    """The effort of all attempts at a stage.

    Attributes:
        seconds: How long they took.
        attempts: Their number: more than one if the run was interrupted.
        measured_seconds: The part of `seconds` for which energy was measured.
        watt_hours: The energy of this part.
        sources: What measured it.
        hardware: The GPU or the processor of the last attempt.
    """

    seconds: float = 0.0
    attempts: int = 0
    measured_seconds: float = 0.0
    watt_hours: float = 0.0
    sources: Sequence[str] = ()
    hardware: str = ""

    def add(self, seconds: float, used: Consumption | None) -> Sums:
        """Adds what an attempt took."""
        longer = replace(self, seconds=self.seconds + seconds)
        if used is None:
            return longer
        return replace(
            longer,
            measured_seconds=self.measured_seconds + seconds,
            watt_hours=self.watt_hours + used.total,
            sources=list(dict.fromkeys([*self.sources, used.source])),
        )


class Effort:
    """Counts the effort of one attempt, and adds it to that of earlier attempts.

    Args:
        folder: The stage's working directory.
        meter: Measures energy; None to count hours alone.
        hardware: What the stage runs on.
        clock: The time in seconds.
    """

    def __init__(
        self, folder: Path, meter: Meter | None, hardware: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._file, self._meter, self._clock = folder / FILE, meter, clock
        before = _read_sums(self._file)
        self._before = replace(before, attempts=before.attempts + 1, hardware=hardware)
        if meter is not None:
            meter.start()
        self._start, self._end = clock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="effort", daemon=True)
        self.sums = self._before
        self._write()
        self._thread.start()

    def update(self) -> None:
        """Adds what was used until now, and writes the sums."""
        self._sum(self._meter.read() if self._meter else None)

    def stop(self) -> Sums:
        """Ends the count, and returns the sums; again if it is called again."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            self._sum(self._meter.stop() if self._meter else None)
        return self.sums

    def _sum(self, used: Consumption | None) -> None:
        self.sums = self._before.add(self._clock() - self._start, used)
        self._write()

    def _write(self) -> None:
        try:
            write_text(self._file, json.dumps(asdict(self.sums)))
        except OSError as error:  # the disk is full or the directory is gone: the stage itself says so
            log.debug(f"the effort of this attempt was not written: {error}")

    def _keep_writing(self) -> None:
        while not self._end.wait(INTERVAL):
            self.update()


def _read_sums(file: Path) -> Sums:
    """Reads the sums of earlier attempts; zero if there are none, or the file is damaged."""
    try:
        return Sums(**(read_json(file) or {}))
    except TypeError:
        return Sums()


@contextmanager
def count_effort(folder: Path, energy: bool) -> Iterator[Effort | None]:
    """Counts the effort of an attempt at a stage while the block runs, also if it fails.

    Args:
        folder: The stage's working directory.
        energy: Also measure the energy of this machine.

    Yields:
        The count; None on every process of a distributed run but the first.
    """
    state = process_state()
    if not state.is_main_process:
        yield None
        return
    on_gpu, processes = state.device.type == "cuda", state.num_processes
    hardware = f"{f'{processes} x ' if processes > 1 else ''}{accelerator()}" if on_gpu else cpu_name()
    effort = Effort(folder, Meter(on_gpu) if energy else None, hardware)
    try:
        yield effort
    finally:
        effort.stop()


def collect_effort(directory: Path, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Reads the effort of each stage of a run from its stage.json, for the report.

    Args:
        directory: The run directory.
        stages: The names of the stages.

    Returns:
        For each stage `hours` and `attempts`; with `hardware`, and `energy_wh`, `measured_hours` and `source`, as far
        as they are known.
    """
    records = {name: read_json(directory / name / "stage.json") for name in stages}
    return {name: _summarize(record) for name, record in records.items() if record and "seconds" in record}


def _summarize(record: Mapping[str, Any]) -> dict[str, Any]:
    sums = Sums(**record["effort"]) if "effort" in record else Sums(float(record["seconds"]), attempts=1)
    found: dict[str, Any] = {"hours": _to_hours(sums.seconds), "attempts": sums.attempts}
    if sums.hardware:
        found["hardware"] = sums.hardware
    if sums.measured_seconds:
        found |= {
            "energy_wh": round(sums.watt_hours, 4),
            "measured_hours": _to_hours(sums.measured_seconds),
            "source": name_sources(sums.sources),
        }
    return found


def _to_hours(seconds: float) -> float:
    return round(seconds / 3600, 5)
