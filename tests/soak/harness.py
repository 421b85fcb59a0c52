"""What the trials share: a tiny world, the command line in forked processes, and what a run came to.

Everything is imported once. A trial forks, and the fork runs the real `main` of the command line in folders of its own,
in a second or two. The processes that load a saved model are forked too, in place of Python started anew.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("01-finetune", "02-distill", "03-prune", "04-quantize")
LIMIT = 240
"""Seconds after which a command counts as hanging."""
IMPORTED = (
    "torch", "transformers", "datasets", "pandas", "onnx", "onnxruntime", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "torch.onnx", "hfcompress.cli", "hfcompress.run.runner",
    "hfcompress.report.card",
    "hfcompress.training.trainer", "hfcompress.distillation.engine", "hfcompress.pruning.engine",
    "hfcompress.pruning.select",
    "hfcompress.quantization.engine", "hfcompress.distillation.fill_cache", "hfcompress.measure.worker",
    "hfcompress.measure.process", "hfcompress.quantization.backends.onnx_int8",
    "hfcompress.models.factorized_embeddings",
)  # fmt: skip


@dataclass
class Outcome:
    """What the trials of one kind came to.

    Attributes:
        kind: In a few words.
        tried: How many.
        wrong: What was not as it should be, one text a trial.
        note: What more there is to say.
        seconds: How long all of them took.
    """

    kind: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Place:
    """Where a trial lives: its run, its caches, its temporary files and its log are below one folder."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def said(self) -> str:
        """What the commands of this place printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def filled(self, state: Path | None) -> Place:
        """This place, empty but for a state's run and caches."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        for name in ("run", "home"):
            if state is not None and (state / name).is_dir():
                shutil.copytree(state / name, self.folder / name)
        (self.folder / "tmp").mkdir(parents=True)
        return self


def prepare() -> Path:
    """Imports everything, and makes a folder for all trials; in memory where there is room for it."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**31
    folder = Path(tempfile.mkdtemp(prefix="hfcompress-soak-", dir=memory if roomy else None))
    os.environ["HFCOMPRESS_HOME"] = str(folder / "home")
    for name in IMPORTED:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, Trainer

    assert all((AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, Trainer))
    from hfcompress.measure import process

    process.subprocess = _Subprocess  # type: ignore[attr-defined]
    gc.freeze()  # what is imported is not looked at again by each fork's garbage collection
    return folder


def make_world(folder: Path) -> Path:
    """A fine-tuned model, data and a recipe of four stages; the recipe's path."""
    from hfcompress.recipe.yaml_text import dump_yaml
    from tests import factories

    def make() -> None:
        data = factories.write_data(folder / "data", {"train": 96, "dev": 48, "test": 48})
        factories.fine_tuned(folder / "model", data)
        train = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "checkpoint_steps": 5}
        content = {
            "name": "tiny",
            "model": str(folder / "model"),
            "task": {"type": "text-classification", "dataset": str(data), "text": ["sentence"], "max_length": 16},
            "stages": [
                {"kind": "finetune", "train": train | {"keep_best": True}},
                {"kind": "distill", "student": {"layers": 1}, "losses": ["hidden_states", "soft_labels"],
                 "teacher_cache": "hidden_states", "train": train},
                {"kind": "prune", "criterion": {"use": "taylor", "rows": 32}, "heads": 0.5, "ffn": 0.5,
                 "multiple_of": 1, "vocabulary": "corpus", "embedding_rank": 8,
                 "schedule": {"use": "iterative", "rounds": 2},
                 "recover": {"epochs": 1, "batch_size": 16, "checkpoint_steps": 4}},
                {"kind": "quantize", "backend": "onnx_int8"},
            ],
            "measure": {"latency": {"batch_sizes": [1], "rounds": 1, "rows": 4, "threads": 1, "cold_starts": 0},
                        "bootstrap": 100},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(dump_yaml(content), encoding="utf-8")

    code = wait(fork(make, folder / "factories.log"))[0]
    assert code == 0, (folder / "factories.log").read_text()
    return folder / "recipe.yaml"


# Processes


class _Worker:
    """Stands in for a `Popen` of measure/worker.py: a fork that serves the same requests."""

    def __init__(self, argv: Sequence[str], stderr: Any, env: dict[str, str], **_: Any) -> None:
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        self.args, self.returncode = argv, None
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(asked, 0)
            os.dup2(answer, 1)
            os.dup2(stderr.fileno(), 2)
            for descriptor in (asked, ask, answered, answer):
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(env)
            sys.stdin = os.fdopen(0, "r")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = 1
            try:
                importlib.import_module("hfcompress.measure.worker").main()
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        os.close(asked)
        os.close(answer)
        self.stdin, self.stdout = os.fdopen(ask, "w"), os.fdopen(answered, "r")

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.002)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class _Subprocess:
    """The module `subprocess`, for measure/process.py."""

    @staticmethod
    def Popen(argv: Any, *arguments: Any, **options: Any) -> Any:  # noqa: N802
        if str(argv[-1]).endswith("worker.py"):
            return _Worker(argv, **options)
        return subprocess.Popen(argv, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


_Subprocess = _Subprocess()  # type: ignore[assignment,misc]


def fork(action: Callable[[], Any], log: Path) -> int:
    """Runs `action` in a process group of its own, its streams in a file; the process's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(stream, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        action()
        code = 0
    except SystemExit as finished:
        code = finished.code if isinstance(finished.code, int) else 0 if finished.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(arguments: Sequence[object], place: Place, before: Callable[[], None] | None = None, **env: str) -> int:
    """Starts `hfcompress ARGUMENTS…` with the caches of a place; the process's number."""

    def action() -> None:
        import datasets

        from hfcompress import cli

        os.environ |= {"HFCOMPRESS_HOME": str(place.home), "TMPDIR": str(place.folder / "tmp"), **env}
        tempfile.tempdir = None
        datasets.config.HF_DATASETS_CACHE = place.folder / "datasets"
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["hfcompress", *map(str, arguments)]
        if before is not None:
            before()
        cli.main()

    return fork(action, place.log)


def wait(
    pid: int,
    seconds: float = LIMIT,
    at: float | None = None,
    number: int = signal.SIGKILL,
    action: Callable[[], None] | None = None,
) -> tuple[Any, float]:
    """Waits for a process.

    Args:
        pid: A process that leads a group.
        seconds: After so many it counts as hanging, and is killed.
        at: Do something to it once it has used so many seconds of processor time: by default, send it a signal.
        number: The signal; SIGKILL goes to the whole group.
        action: What to do in place of that.

    Returns:
        Its exit code, negative for a signal, or "hangs"; and the processor time that it used.
    """
    end, used = time.monotonic() + seconds, 0.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _kill_group(pid)
            return os.waitstatus_to_exitcode(status), used
        used = _processor_time(pid) or used
        if at is not None and used >= at:
            at = None
            if action is not None:
                action()
            elif number == signal.SIGKILL:
                _kill_group(pid)
            else:
                os.kill(pid, number)
        if time.monotonic() > end:
            _kill_group(pid)
            os.waitpid(pid, 0)
            return "hangs", used
        time.sleep(0.005)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _processor_time(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def in_parallel(trials: Iterable[Callable[[], list[str]]], jobs: int) -> Iterator[list[str]]:
    """Runs trials, so many at once, each in a fork; what was wrong in each, in the order in which they end."""
    running: dict[int, int] = {}

    def ended() -> list[str]:
        pid, status = os.wait()
        with os.fdopen(running.pop(pid), "rb") as stream:
            content = stream.read()
        return pickle.loads(content) if content else [f"the trial died: {status}"]  # noqa: S301

    for trial in trials:
        if len(running) >= jobs:
            yield ended()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                found = trial()
            except BaseException:
                found = [traceback.format_exc()]
            with os.fdopen(writer, "wb") as stream:
                stream.write(pickle.dumps([text[:8000] for text in found[:4]]))
            os._exit(0)
        os.close(writer)
        running[pid] = reader
    while running:
        yield ended()


def judged(kind: str, trials: Sequence[Callable[[], list[str]]], jobs: int) -> Outcome:
    """The outcome of trials of one kind."""
    start, outcome = time.monotonic(), Outcome(kind)
    for wrong in in_parallel(trials, jobs):
        outcome.tried += 1
        if wrong:
            outcome.wrong.append("\n".join(wrong))
            print(f"NOT AS IT SHOULD ({kind}): {outcome.wrong[-1]}", flush=True)
    outcome.seconds = time.monotonic() - start
    return outcome


# What a run came to


def facts(place: Place) -> dict[str, Any]:
    """All that a run left, without what is measured by the clock."""
    found: dict[str, Any] = {}
    for top in (place.run, place.home):
        for path in sorted(top.rglob("*")):
            name = path.relative_to(place.folder).as_posix()
            if path.is_file():
                found[name] = _fact(path)
            elif not any(path.iterdir()) and name not in ("home/teachers",):
                found[name] = "an empty directory"
    return found


def _fact(path: Path) -> Any:
    content = path.read_bytes()
    if path.name == "stage.json":
        return {key: value for key, value in json.loads(content).items() if key not in ("seconds", "effort")}
    if path.name == "recipe.lock.json":
        return {key: json.loads(content)[key] for key in ("recipe", "overrides", "revisions")}
    if path.name == "report.json":
        report = json.loads(content)
        kept = ("stage", "kind", "quality", "quality_interval", "parameters", "encoder_parameters", "disk_bytes",
                "macs")  # fmt: skip
        rows = [{key: row[key] for key in kept} for row in report["rows"]]
        return {key: report[key] for key in ("recipe", "key", "cuts", "rounded", "task")} | {"rows": rows}
    if path.name in ("README.md", "report.md", "report.html", "report.csv") or path.suffix == ".png":
        return "written" if content else "empty"
    return hashlib.sha256(content).hexdigest()[:16] if content else "empty"


def differences(place: Place, expected: dict[str, Any]) -> list[str]:
    """Where a run is not what an uninterrupted one is."""
    return _unlike(facts(place), expected)


def _unlike(found: Any, expected: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        return [x for key in keys for x in _unlike(found.get(key), expected.get(key), f"{name} {key}".strip())]
    if found == expected:
        return []
    return [f"{name}: {str(found)[:200]} in place of {str(expected)[:200]}"]


def ends_alike(place: Place, arguments: Sequence[object], expected: dict[str, Any]) -> list[str]:
    """Runs a command to its end; what is not as after an uninterrupted run."""
    code, _ = wait(command(arguments, place))
    if code != 0:
        return [f"{arguments[0]} ended with {code}: {place.said()[-1500:]}"]
    told = ["a traceback: " + place.said()[-1500:]] if "Traceback" in place.said() else []
    return told + differences(place, expected)


@dataclass(frozen=True)
class World:
    """What the trials start from.

    Attributes:
        folder: For all trials.
        recipe: The recipe of four stages.
        whole: What an uninterrupted run comes to.
        seconds: The processor time that it takes.
    """

    folder: Path
    recipe: Path
    whole: dict[str, Any]
    seconds: float

    def place(self, name: str) -> Place:
        return Place(self.folder / name)

    def run(self, place: Place, *changes: str) -> list[object]:
        """The arguments of the run of the recipe, with overrides."""
        return ["run", self.recipe, "--output", place.run, *(x for change in changes for x in ("--set", change))]

    def whole_with(self, name: str, *changes: str) -> dict[str, Any]:
        """What an uninterrupted run of a changed recipe comes to, in a place of that name."""
        place = self.place(name).filled(None)
        code, _ = wait(command(self.run(place, *changes), place))
        assert code == 0, place.said()[-3000:]
        return facts(place)


def make(folder: Path) -> World:
    """The world, with an uninterrupted run in the place `reference`."""
    recipe, place = make_world(folder), Place(folder / "reference").filled(None)
    _import_what(["run", recipe, "--output", place.run], place)
    place.filled(None)
    code, used = wait(command(["run", recipe, "--output", place.run], place))
    assert code == 0, place.said()[-3000:]
    return World(folder, recipe, facts(place), used)


def _import_what(arguments: Sequence[object], place: Place) -> None:
    """Runs a command once, and imports here what it had to import, so that no trial has to."""
    names = place.folder.with_name("imported")

    def write_names() -> None:
        names.write_text("\n".join(sys.modules), encoding="utf-8")

    def before() -> None:
        from hfcompress import cli

        main = cli.main

        def main_then_names() -> None:
            try:
                main()
            finally:
                write_names()

        cli.main = main_then_names

    code, _ = wait(command(arguments, place, before))
    assert code == 0, place.said()[-3000:]
    for name in names.read_text(encoding="utf-8").splitlines():
        if name not in sys.modules and "transformers_modules" not in name:
            with suppress(Exception):
                importlib.import_module(name)
    gc.freeze()


def draw(seed: int, *of: object) -> random.Random:
    """A generator of its own for each trial."""
    return random.Random(f"{seed}/{of}")
