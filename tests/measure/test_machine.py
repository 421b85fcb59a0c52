"""Whether other work beside the models is seen, and nothing else is taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from hfcompress.measure import machine
from hfcompress.measure.machine import Span, Turn, judge_all, state
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.worker import read_run_queue, subtract_usage
from hfcompress.models.artifact import open_artifact


def span(wall: float = 10.0, used: float = 10.0, own: float = 10.0, stolen: float = 0.0, throttled: float = 0.0,
         processors: int = 2) -> Span:  # fmt: skip
    return Span(wall, processors, used, own, stolen, throttled)


def turn(waited: float | None = 0.0, wall: float = 1.0, threads: int = 2, cpu: float = 1.0) -> Turn:
    return Turn([wall], threads, wall, cpu, waited, 12)


# Readings of a machine with two processors: what was measured on it while nothing else ran, and beside a busy loop.


@pytest.mark.parametrize(
    ("spans", "turns"),
    [
        ([span(used=20.0, own=19.9)], [turn(0.0053)]),  # PyTorch on two threads, which spin
        ([span(used=17.3, own=17.3)], [turn(0.0079)]),  # ONNX Runtime, which wakes its threads for each operator
        ([span(used=10.2, own=10.0)], [turn(0.0071, threads=1)]),
        ([span(used=9.0, own=9.0)], [turn(0.07)]),  # a model of 0.2 ms a batch, whose threads wake one another
        ([span(used=0.4, own=0.0)], []),  # all our processes are idle: the system's services alone
        ([span(used=12.8, own=13.5)], [turn(0.18, threads=4)]),  # four threads wait for each other
        ([span(used=17.7, own=17.6)], [turn(0.61, threads=4)]),
        ([span(wall=0.02, used=0.04, own=0.02)], [turn(0.004, wall=0.01)]),  # too short to be told from nothing
        ([], [turn(0.01)]),  # all on a GPU
        ([span()], [turn(None)]),  # a system that does not tell the run queue
    ],
)
def test_a_quiet_machine_is_quiet(spans: list[Span], turns: list[Turn]) -> None:
    found = state(spans, turns)
    assert (found["busy"], found["why"]) == (False, [])


@pytest.mark.parametrize(
    ("spans", "turns", "why"),
    [
        ([span(used=20.0, own=10.0)], [turn(0.0015, threads=1)], "other work took 50%"),  # it leaves us a processor
        ([span(used=20.0, own=10.1)], [turn(0.5)], "other work took 49%"),
        ([span(used=20.0, own=10.0)], [turn(0.6, threads=4)], "other work took 50%"),
        ([span(used=10.0, own=10.0)], [turn(0.46)], "a model's threads waited for a processor 45%"),  # it is hidden
        ([span(used=20.0, own=18.0, stolen=2.0)], [turn()], "the hypervisor gave 10%"),
        ([span(throttled=3.0)], [turn()], "the CPU quota held the models back 30%"),
        ([], [turn(0.5)], "a model's threads waited for a processor 49%"),
        ([span()], [turn(None, threads=1, cpu=0.5)], "a model's threads waited for a processor 49%"),  # macOS
        ([span(used=80.0, own=70.0, processors=8)], [turn(0.01, threads=8)], "other work took 12%"),
    ],
)
def test_other_work_is_seen(spans: list[Span], turns: list[Turn], why: str) -> None:
    found = state(spans, turns)
    assert found["busy"] is True
    assert any(sentence.startswith(why) for sentence in found["why"])


def test_the_state_tells_what_was_seen() -> None:
    found = state([span(used=20.0, own=10.0)], [turn(0.7), turn(0.1, wall=3.0)], load=2.345)
    assert found == {
        "busy": True,
        "why": [
            "other work took 50% of the processors' time",
            "a model's threads waited for a processor 20% of the time",
        ],
        "other_share": 0.499,  # (20 - 10 - 2 ticks) of 20
        "wait_share": 0.2,  # 0.8 of 4 seconds
        "stolen_share": 0.0,
        "throttled_share": 0.0,
        "involuntary_per_s": 6.0,
        "load": 2.35,
    }
    assert state([], [])["wait_share"] is None


def test_one_busy_measurement_of_two_makes_the_machine_busy() -> None:
    short, long = ([span(wall=1.0, used=2.0, own=1.2)], [turn()]), ([span(wall=99.0, used=99.0, own=99.0)], [turn()])
    assert judge_all([long, long])["busy"] is False
    found = judge_all([long, short])
    assert found["busy"] is True
    assert found["why"] == ["other work took 39% of the processors' time"]
    assert found["other_share"] < machine.OTHERS


# Where the readings come from


def test_every_threads_own_queue_is_read(tmp_path: Path) -> None:
    for thread, told in {"7": "900 2000000000 5", "8": "10 500000000 1", "9": "", "10": None}.items():
        (tmp_path / "task" / thread).mkdir(parents=True)
        if told is not None:
            (tmp_path / "task" / thread / "schedstat").write_text(told)
    assert read_run_queue(tmp_path) == {"7": 2.0, "8": 0.5}
    assert read_run_queue(tmp_path / "none") is None


def test_what_the_worst_thread_waited_counts() -> None:
    before = {"wall": 1.0, "cpu": 2.0, "involuntary": 3, "queued": {"7": 1.0, "8": 4.0, "gone": 9.0}}
    after = {"wall": 2.5, "cpu": 4.0, "involuntary": 10, "queued": {"7": 1.5, "8": 4.1, "new": 0.25}}
    assert subtract_usage(before, after) == {"wall": 1.5, "cpu": 2.0, "involuntary": 7, "waited": 0.5}
    assert subtract_usage(before, after | {"queued": None})["waited"] is None


def test_a_moment_counts_the_permitted_processors_and_our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [SimpleNamespace(user=1.0, nice=0.5, system=2.0, idle=70.0, iowait=5.0, irq=0.25, softirq=0.25, steal=1.0),
            SimpleNamespace(user=900.0, system=900.0, idle=1.0),
            SimpleNamespace(user=3.0, system=1.0, idle=9.0)]  # fmt: skip
    used = {os.getpid(): (2.0, 1.0), 77: (0.5, 0.25)}
    monkeypatch.setattr(machine, "permitted_processors", lambda: [0, 2])
    monkeypatch.setattr(machine, "throttled_seconds", lambda: 4.0)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: rows)
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(
        cpu_times=lambda: SimpleNamespace(user=used[pid][0], system=used[pid][1], children_user=99.0)))  # fmt: skip
    found = machine.read_counters([77, os.getpid()])
    assert (found.processors, found.used, found.own, found.stolen, found.throttled) == (2, 9.0, 3.75, 1.0, 4.0)
    assert found.since(found) == Span(0.0, 2, 0.0, 0.0, 0.0, 0.0)


# The real thing


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A graph that takes a few milliseconds for a batch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path = tmp_path_factory.mktemp("heavy")
    wide = np.full((1024, 1024), 1e-4, dtype="float32")
    weights = [("first", wide[:16]), *[(f"w{i}", wide) for i in range(4)], ("last", wide[:, :2])]
    nodes = [
        helper.make_node("Mul", ["input_ids", "attention_mask"], ["real"]),
        helper.make_node("Cast", ["real"], ["x0"], to=TensorProto.FLOAT),
    ]
    nodes += [helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"]) for i, (name, _) in enumerate(weights)]
    nodes.append(helper.make_node("Identity", [f"x{len(weights)}"], ["logits"]))
    graph = helper.make_graph(
        nodes, "heavy",
        [helper.make_tensor_value_info(x, TensorProto.INT64, ["b", "s"]) for x in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path / "model.onnx")
    (path / "config.json").write_text("{}")
    return open_artifact(path)


@pytest.fixture
def crowded() -> Iterator[None]:
    """This process and what it starts share one processor with a busy loop."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the system has no CPU affinity")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    loop = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    beside = subprocess.Popen([sys.executable, "-c", loop])
    try:
        yield
    finally:
        beside.kill()
        beside.wait()
        os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("crowded")
def test_a_busy_loop_on_the_same_processor_is_seen(heavy: Any) -> None:
    batch = {"input_ids": np.ones((256, 16), "int64"), "attention_mask": np.ones((256, 16), "int64")}
    with ModelProcess(heavy, "", threads=1) as process:
        process.prepare([batch] * 40)
        before = machine.read_counters([process.pid])
        timed = process.time()
        found = state([machine.read_counters([process.pid]).since(before)], [timed])
    assert found["busy"]
    assert found["other_share"] > 0.2
    if timed.waited is not None:  # else this system does not tell it
        assert found["wait_share"] > 0.2
