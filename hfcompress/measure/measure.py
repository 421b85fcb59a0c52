"""Measures the quality, size, latency, memory and energy of all models in the same way, in one run.

Each model stays in a process of its own from the start to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hfcompress.data.labels import names_by_id
from hfcompress.measure.answers import Answer, Answers, align
from hfcompress.measure.batch_sensitivity import measure_batch_sensitivity
from hfcompress.measure.cold_start import time_cold_starts
from hfcompress.measure.energy import AnyEnergy, measure_energy
from hfcompress.measure.environment import device_facts
from hfcompress.measure.plain_runtime import PlainRuntime, open_plain_runtimes
from hfcompress.measure.plain_runtime import describe as describe_plain_runtime
from hfcompress.measure.process import ModelProcess, WorkerError
from hfcompress.measure.quality import QUALITY_BATCH, compute_outputs, judge_outputs, judge_rows, require_padding_unread
from hfcompress.measure.rows import Rows
from hfcompress.measure.seeds import AnySeeds
from hfcompress.measure.sizes import sizes
from hfcompress.measure.sustained import measure_sustained
from hfcompress.measure.timing import Latency, time_models
from hfcompress.models.artifact import Artifact, label_ids, load_tokenizer, read_config
from hfcompress.utils.logging import log
from hfcompress.utils.margin import AnyMargin, Margin
from hfcompress.utils.price import AnyPrice
from hfcompress.utils.processors import default_threads, thread_counts
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task


class Measure(StrictModel):
    """Options of measuring."""

    latency: Latency = Latency()
    energy: AnyEnergy = None
    """`true`, or options: measure the watt-hours of 1,000 rows, and of making each model, with codecarbon (extra
    `energy`)."""
    price: AnyPrice | None = None
    """The price of an hour of this machine, such as `0.40` or `0.40 EUR`; the report then has the cost of a million
    rows."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamples behind the 95% interval."""
    margin: AnyMargin = Margin(0.01, relative=True)
    """The largest loss of quality that is accepted: `1%` of the source's score, or `0.01` of the metric. The report
    says whether a loss beyond it is ruled out, and how many rows could tell."""
    plain_runtime: bool = True
    """If a model runs in ONNX Runtime or OpenVINO, also time the source in ONNX Runtime in float32, and in PyTorch in
    bfloat16 if the processor multiplies that natively, to tell how much of a speed-up is due to the runtime alone."""
    slices: list[str] = []
    """Columns of the data; the report also compares the models for each of their values."""
    seeds: AnySeeds = None
    """Make the models with several seeds, and report the mean and the standard deviation of their quality: `3` for the
    recipe's seed and the next two, or a list with the recipe's. Each takes as long as a run; only the models of the
    recipe's seed are timed."""


def measure(
    artifacts: Sequence[Artifact],
    task: Task,
    options: Measure,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], Answers]:
    """Measures models for a report.

    Args:
        artifacts: The models; the first is the source, which the others are compared with.
        task: Gives the rows on which the quality of all models is measured.
        options: The options of measuring.
        seed: Seed of the choice of timed rows, and of the bootstrap.
        progress: Called with a line about each step.

    Returns:
        `machine`, its state while the models were timed, and `rows`, one for each artifact, in order; and the answers
        of the models.
    """
    with _load_models(artifacts, task, options, progress) as loaded:
        speeds, timing = _time(loaded, options.latency, seed, progress)
        rows, answers = [], []
        for process, data in zip(loaded.processes, loaded.rows, strict=True):
            progress(f"{process.artifact.stage}: memory" + (", energy" if options.energy else "") + ", quality")
            memory = process.peak_memory()
            energy = measure_energy(process) if options.energy else None
            require_padding_unread(process, data)
            outputs = compute_outputs(process, data)
            answers.append(judge_outputs(outputs, data))
            quality, interval = _score_answers(answers[-1], task, options.bootstrap, seed)
            row = _make_row(process, task, quality, interval, memory, energy)
            sensitivity = measure_batch_sensitivity(process, data, outputs, QUALITY_BATCH[task.head])
            rows.append({**row, "batch_sensitivity": sensitivity})
        sustained = _measure_sustained(loaded, options.latency, seed, progress)
    rows = [{**row, **speed, "sustained": each} for row, speed, each in zip(rows, speeds, sustained, strict=True)]
    content: dict[str, Any] = {**timing, "rows": [_compare(row, rows[0]) for row in rows]}
    if answers[0].logits is not None:
        content["labels"] = names_by_id(label_ids(read_config(artifacts[0].path)))
    return content, align(answers)


def score_models(artifacts: Sequence[Artifact], task: Task, options: Measure) -> list[float]:
    """Measures the quality of models, and nothing else.

    Args:
        artifacts: The models, in the order of the scores.
        task, options: See `measure`.
    """
    alone = options.model_copy(update={"plain_runtime": False})
    with _load_models(artifacts, task, alone, lambda _: None) as loaded:
        answers = [judge_rows(process, data) for process, data in zip(loaded.processes, loaded.rows, strict=True)]
    return [task.score(answer.predictions, answer.references) for answer in answers]


def time_again(
    artifacts: Sequence[Artifact],
    task: Task,
    options: Measure,
    seed: int,
    content: Mapping[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures the times of a report's models again, and nothing else.

    Args:
        artifacts: The models of the report's rows, in order.
        task, options, seed, progress: See `measure`.
        content: The report.

    Returns:
        The report with the new times.
    """
    with _load_models(artifacts, task, options, progress) as loaded:
        speeds, timing = _time(loaded, options.latency, seed, progress)
        sustained = _measure_sustained(loaded, options.latency, seed, progress)
    rows = [
        {**row, **speed, "speedup": speed["latency"][0]["speedup"], "sustained": each}
        for row, speed, each in zip(content["rows"], speeds, sustained, strict=True)
    ]
    return {**content, **timing, "rows": rows}


@dataclass(frozen=True)
class _Loaded:
    """The loaded models.

    Attributes:
        processes: The models, the source first.
        rows: The judged rows as each of them reads them.
        plain: The source in plain runtimes, with the process of each.
    """

    processes: list[ModelProcess]
    rows: list[Rows]
    plain: list[tuple[PlainRuntime, ModelProcess]]


def _time(
    loaded: _Loaded, options: Latency, seed: int, progress: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Times the models, and the source in plain runtimes with them.

    Returns:
        For each model `latency`, `latency_grid` and `cold_start` of its row; and `machine` and `plain_runtime` of the
        report.
    """
    processes = [*loaded.processes, *(process for _, process in loaded.plain)]
    encoded = [*loaded.rows, *(loaded.rows[0] for _ in loaded.plain)]
    entries, state = time_models(processes, encoded, options, seed, progress, len(loaded.plain))
    entries = [_note_dtype(process, own) for process, own in zip(processes, entries, strict=True)]
    split, models = len(options.batch_sizes), len(loaded.processes)
    timing: dict[str, Any] = {"machine": _describe_machine(state, options)}
    if loaded.plain:
        timing["plain_runtime"] = [
            describe_plain_runtime(plain, own[:split], own[split:])
            for (plain, _), own in zip(loaded.plain, entries[models:], strict=True)
        ]
    firsts = [next(rows.batches([[0]])) for rows in loaded.rows] if options.cold_starts else []
    starts = time_cold_starts(loaded.processes, firsts, options.cold_starts, progress)
    speeds = [
        {"latency": own[:split], "latency_grid": own[split:], "cold_start": start}
        for own, start in zip(entries[:models], starts, strict=True)
    ]
    return speeds, timing


def _measure_sustained(
    loaded: _Loaded, options: Latency, seed: int, progress: Callable[[str], None]
) -> list[list[dict[str, Any]]]:
    """Measures the sustained throughput of each model last of all, because graphs are loaded again for it."""
    if not options.sustained:
        return [[] for _ in loaded.processes]
    return measure_sustained(loaded.processes, loaded.rows, options, seed, progress)


def _note_dtype(process: ModelProcess, latency: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the computing type and the stored type to the times of a model if the two differ."""
    if process.dtype == process.artifact.dtype:
        return latency
    return [{**entry, "dtype": process.dtype, "stored": process.artifact.dtype} for entry in latency]


def _describe_machine(state: Mapping[str, Any], options: Latency) -> dict[str, Any]:
    """Describes the machine of the timing: its state, its device, and the thread counts that models chose from."""
    threads = [options.threads] if options.threads else thread_counts(default_threads())
    return {**state, **device_facts(), "threads": threads}


@contextmanager
def _load_models(
    artifacts: Sequence[Artifact], task: Task, options: Measure, progress: Callable[[str], None]
) -> Iterator[_Loaded]:
    """Loads each model in a process of its own, and encodes the judged rows with its tokenizer.

    A plain runtime that cannot load the source is left out.
    """
    rows, device = task.read(task.judged_split()), options.latency.device
    threads = options.latency.threads or default_threads()
    with ExitStack() as stack:
        runtimes = list[PlainRuntime]()
        if options.plain_runtime:
            runtimes = stack.enter_context(open_plain_runtimes(artifacts, task, device))
        progress("loading every model in a process of its own")
        processes = [
            stack.enter_context(ModelProcess(a, task.auto_class, device, threads, task.head)) for a in artifacts
        ]
        plain = []
        for each in runtimes:
            try:
                process = ModelProcess(each.artifact, task.auto_class, device, threads, task.head, dtype=each.dtype)
            except WorkerError as error:
                log.info(f"the {each.artifact.stage} is not timed: {str(error).partition(chr(10))[0]}")
                continue
            plain.append((each, stack.enter_context(process)))
        encoded = [Rows(task, load_tokenizer(a.path, task), rows, label_ids(read_config(a.path))) for a in artifacts]
        yield _Loaded(processes, encoded, plain)


def _score_answers(answer: Answer, task: Task, samples: int, seed: int) -> tuple[dict[str, float], list[float]]:
    predictions, references = answer.predictions, answer.references
    low, high = task.interval(predictions, references, samples, seed)
    return {task.metric_name: task.score(predictions, references), "n": len(references)}, [low, high]


def _make_row(
    process: ModelProcess,
    task: Task,
    quality: dict[str, float],
    interval: list[float],
    memory: tuple[int, int | None],
    energy: dict[str, Any] | None,
) -> dict[str, Any]:
    artifact, shape = process.artifact, process.artifact.shape
    parts = sizes(artifact)
    return {
        "stage": artifact.stage,
        "kind": artifact.kind,
        "quality": quality,
        "quality_interval": interval,
        "parameters": shape.parameters if shape else process.loaded["parameters"],
        "encoder_parameters": shape.encoder_parameters if shape else None,
        "disk_bytes": artifact.disk_bytes,
        "embedding_bytes": parts and parts["embeddings"],
        "bytes_by_part": parts,
        "macs": shape.macs(task.max_length) if shape else None,
        "peak_memory_bytes": memory[0],
        "device_memory_bytes": memory[1],
        "energy_wh_per_1k": energy and energy["wh_per_1k"],
        **({"energy": energy} if energy else {}),
    }


def _compare(row: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Adds the speed-up at the first batch size and the compression, both relative to the source."""
    compression = round(source["disk_bytes"] / row["disk_bytes"], 4)
    return {**row, "speedup": row["latency"][0]["speedup"], "compression": compression}
