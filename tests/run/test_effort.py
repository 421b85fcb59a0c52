"""The hours and the energy of a stage, over interrupted attempts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.measure.energy import Consumption
from hfcompress.run.effort import FILE, Effort, collect_effort, count_effort
from hfcompress.utils.files import remove


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Meter:
    """A meter of 10 watts that reads a clock."""

    def __init__(self, clock: Clock, source: str = "RAPL") -> None:
        self.clock, self.source, self.began = clock, source, 0.0

    def start(self) -> None:
        self.began = self.clock()

    def read(self) -> Consumption:
        return Consumption({"processor": 10 * (self.clock() - self.began) / 3600}, {"processor": self.source})

    stop = read


def _effort(folder: Path, clock: Clock, meter: Any = None) -> Effort:
    return Effort(folder, meter, "A processor", clock)


def _collect(folder: Path, sums: Any) -> dict[str, Any]:
    (folder / "01-distill").mkdir(exist_ok=True)
    record = {"seconds": 1.0, "effort": vars(sums)}
    (folder / "01-distill" / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return collect_effort(folder, ["01-distill", "02-prune"])


def test_a_killed_attempt_counts_up_to_its_last_writing(tmp_path: Path) -> None:
    clock = Clock()
    killed = _effort(tmp_path, clock, Meter(clock))
    clock.now = 1800.0
    killed.update()
    clock.now = 1805.0  # it is killed here

    second = _effort(tmp_path, clock, Meter(clock))
    clock.now = 3605.0
    sums = second.stop()
    assert (sums.seconds, sums.attempts) == (3600.0, 2)
    assert sums.watt_hours == pytest.approx(10.0)
    assert second.stop() == sums
    assert _collect(tmp_path, sums) == {
        "01-distill": {"hours": 1.0, "attempts": 2, "hardware": "A processor", "energy_wh": 10.0,
                       "measured_hours": 1.0, "source": "RAPL"},
    }  # fmt: skip
    killed.stop()


def test_hours_without_energy_are_told_apart(tmp_path: Path) -> None:
    clock = Clock()
    first = _effort(tmp_path, clock)
    clock.now = 1800.0
    first.stop()
    second = _effort(tmp_path, clock, Meter(clock))
    clock.now = 3600.0
    second.stop()
    third = _effort(tmp_path, clock, Meter(clock, "NVML"))
    clock.now = 5400.0
    found = _collect(tmp_path, third.stop())["01-distill"]
    assert (found["hours"], found["measured_hours"], found["source"]) == (1.5, 1.0, "RAPL and NVML")


def test_a_stage_of_an_earlier_version_has_its_seconds(tmp_path: Path) -> None:
    (tmp_path / "01-distill").mkdir()
    (tmp_path / "01-distill" / "stage.json").write_text('{"seconds": 90.0}', encoding="utf-8")
    assert collect_effort(tmp_path, ["01-distill"]) == {"01-distill": {"hours": 0.025, "attempts": 1}}


@pytest.mark.parametrize("content", ["", "[]", '{"seconds": 1.0, "other": 2}'])
def test_a_damaged_file_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    clock = Clock()
    assert _effort(tmp_path, clock).stop().attempts == 1


def test_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "01-distill.partial"
    folder.mkdir()
    effort = _effort(folder, Clock())
    remove(folder)
    effort.stop()
    assert not folder.exists()


def test_an_attempt_that_fails_is_counted(tmp_path: Path) -> None:
    def fail() -> None:
        with count_effort(tmp_path, energy=False):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with count_effort(tmp_path, energy=False) as effort:
        assert effort is not None
    assert effort.sums.attempts == 2
    assert effort.sums.hardware
