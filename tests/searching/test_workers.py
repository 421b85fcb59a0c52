"""Several processes: a worker that is killed, and three that share one search."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

WORKER = """
import os, signal, sys, time
from pathlib import Path
from hfcompress.recipe.target import Target
from hfcompress.searching.candidate import STEPS
from hfcompress.searching.engine import search
from hfcompress.searching.trials import Trials
from hfcompress.utils.margin import Margin
from tests.searching.landscape import Landscape

class Killed(Landscape):
    def judge(self, model):
        if len(self.made) > kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().judge(model)

folder, kill, storage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None
world = Killed()
target = Target(max_drop=Margin(0.02, relative=False), hours=10)
ending = search(world, Trials(folder, "a", storage), target, ["fast", "slow"], STEPS, world.clock)
import json
print(json.dumps({"made": [x.to_json() for x in world.made], "best": ending.best.candidate.to_json(),
                  "tried": [x.candidate.to_json() for x in ending.outcomes]}))
"""
NEVER = 1000


def start(folder: Path, kill: int = NEVER, storage: str = "") -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WORKER, str(folder), str(kill), storage]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def finish(worker: subprocess.Popen[str]) -> Mapping[str, object]:
    said, complained = worker.communicate(timeout=300)
    assert worker.returncode == 0, complained
    return json.loads(said.splitlines()[-1])


def spell(candidates: object) -> list[str]:
    assert isinstance(candidates, list)
    return sorted(json.dumps(candidate, sort_keys=True) for candidate in candidates)


@pytest.mark.slow
def test_a_worker_killed_with_9_is_replaced_and_its_candidate_tried_again(tmp_path: Path) -> None:
    whole = finish(start(tmp_path / "whole"))
    assert start(tmp_path / "cut", kill=4).wait(timeout=300) == -9
    rest = finish(start(tmp_path / "cut"))
    assert (spell(rest["tried"]), rest["best"]) == (spell(whole["tried"]), whole["best"])


@pytest.mark.slow
@pytest.mark.parametrize("database", [False, True])
def test_three_workers_try_what_one_tries_and_none_tries_what_another_has(tmp_path: Path, database: bool) -> None:
    storage = f"sqlite:///{tmp_path}/trials.db" if database else ""
    alone = finish(start(tmp_path / "alone"))
    workers = [start(tmp_path / "shared", storage=storage) for _ in range(3)]
    found = [finish(worker) for worker in workers]
    made = [candidate for each in found for candidate in spell(each["made"])]
    assert sorted(made) == spell(alone["tried"])
    assert all(each["best"] == alone["best"] for each in found)
