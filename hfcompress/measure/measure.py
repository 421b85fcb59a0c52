"""Every model measured the same way: quality, size, latency, memory and energy, in one run.

Each variant lives in a process of its own from the start to the end; their rounds are interleaved, so that what the
machine does meanwhile touches all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hfcompress.base.component import Strict
from hfcompress.base.errors import HfcompressError
from hfcompress.measure.process import Batch, ModelProcess, default_threads
from hfcompress.measure.sizes import sizes
from hfcompress.model.artifact import Artifact, label_ids, load_tokenizer, read_config

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray

MAX_BATCHES = 64
ENERGY_SECONDS = 10.0
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
QUALITY_BATCH = {"sequence": 32, "token": 32, "span": 32, "mask": 8}
"""Rows that are judged together; a mask head answers with the whole vocabulary for each token."""


class Latency(Strict):
    """How speed is measured."""

    device: Literal["cpu", "cuda"] = "cpu"
    batch_sizes: list[int] = Field(default=[1, 32], min_length=1)
    threads: int | None = Field(default=None, ge=1)
    """Threads of one operator; the default is every processor the process may use."""
    rounds: int = Field(default=5, ge=1)
    """How often the variants take turns."""
    rows: int = Field(default=256, ge=1)
    """Rows of the judged split that a round runs, in at most 64 batches, each padded to its longest row."""


class Measure(Strict):
    """What the report measures."""

    latency: Latency = Latency()
    energy: bool = False
    """Estimate watt-hours for 1,000 rows with codecarbon (extra `energy`)."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamples behind the 95% interval."""


def measure(
    artifacts: Sequence[Artifact],
    task: Any,
    options: Measure,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row for each artifact, in order; the first is what the others are held against.

    Args:
        artifacts: The source first.
        task: Gives the rows that all of them are judged on.
        options: What to measure.
        seed: Draws the rows that are timed, and the bootstrap.
        progress: Told what is being done.
    """
    rows = task.read(task.judged_split())
    with ExitStack() as stack:
        progress("loading every model in a process of its own")
        processes = [
            stack.enter_context(
                ModelProcess(
                    a, task.auto_class, options.latency.device, options.latency.threads or default_threads(), task.head
                )
            )
            for a in artifacts
        ]
        encoded = [Rows(task, load_tokenizer(a.path), rows, label_ids(read_config(a.path))) for a in artifacts]
        timings = _timed(processes, encoded, options.latency, seed, progress)
        found = []
        for process, data, latency in zip(processes, encoded, timings, strict=True):
            progress(f"{process.artifact.stage}: memory" + (", energy" if options.energy else "") + ", quality")
            memory = process.peak_bytes()
            energy = process.energy(ENERGY_SECONDS) if options.energy else None
            quality, interval = _quality(process, data, options.bootstrap, seed)
            found.append(_row(process, task, quality, interval, latency, memory, energy))
    return [_against(row, found[0]) for row in found]


class Rows:
    """Rows as one model reads them, to be judged on."""

    def __init__(self, task: Any, tokenizer: Any, rows: datasets.Dataset, labels: Mapping[str, int]) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.encoded: datasets.Dataset = task.encode(rows, tokenizer, labels)

    def batches(self, groups: Iterable[Sequence[int]], names: Sequence[str] = TOKENS) -> Iterator[Batch]:
        """Arrays of each group of rows, padded to its longest."""
        for group in groups:
            batch = self.task.batch(self.encoded.__getitems__(list(group)), self.tokenizer)
            yield {name: batch[name].numpy() for name in names if name in batch}


def _timed(
    processes: Sequence[ModelProcess],
    encoded: Sequence[Rows],
    options: Latency,
    seed: int,
    progress: Callable[[str], None],
) -> list[list[dict[str, Any]]]:
    import numpy as np

    found: list[list[dict[str, Any]]] = [[] for _ in processes]
    order = np.random.default_rng(seed).permutation(min(len(rows.encoded) for rows in encoded))
    for size in options.batch_sizes:
        count = min(max(min(options.rows, len(order)) // size, 1), MAX_BATCHES)
        groups = [[int(order[i % len(order)]) for i in range(b * size, (b + 1) * size)] for b in range(count)]
        lengths = []
        for process, rows in zip(processes, encoded, strict=True):
            batches = list(rows.batches(groups))
            lengths.append(round(float(np.mean([b["input_ids"].shape[1] for b in batches]))))
            process.prepare(batches)
        seconds: list[list[float]] = [[] for _ in processes]
        for number in range(options.rounds):
            progress(f"latency, batch {size}: round {number + 1} of {options.rounds}")
            for kept, process in zip(seconds, processes, strict=True):
                kept += process.time()
        for row, process, length, kept in zip(found, processes, lengths, seconds, strict=True):
            row.append(_latency(process, size, length, kept))
    return found


def _latency(process: ModelProcess, size: int, length: int, seconds: list[float]) -> dict[str, Any]:
    import numpy as np

    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {
        "device": process.device,
        "runtime": {"onnx": "onnxruntime"}.get(process.artifact.runtime, process.artifact.runtime),
        "dtype": process.artifact.dtype,
        "threads": process.threads,
        "batch_size": size,
        "sequence_length": length,
        "p50_ms": round(float(p50) * 1000, 4),
        "p95_ms": round(float(p95) * 1000, 4),
        "samples_per_s": round(size * len(seconds) / float(np.sum(seconds)), 2),
    }


def _quality(process: ModelProcess, rows: Rows, samples: int, seed: int) -> tuple[dict[str, float], list[float]]:
    task = rows.task
    predictions, references = judged(process, rows)
    low, high = task.interval(predictions, references, samples, seed)
    return {task.metric: task.score(predictions, references), "n": len(references)}, [low, high]


def judged(process: ModelProcess, rows: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
    """A model's predictions for all rows, and the references; rows of like length are read together.

    Raises:
        HfcompressError: where it answers with values that are not finite.
    """
    import numpy as np

    task, order = rows.task, np.argsort(np.asarray(rows.encoded["length"][:]), kind="stable").tolist()
    size = QUALITY_BATCH[task.head]
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    outputs = process.logits(rows.batches(groups, (*TOKENS, "labels")))
    if not np.isfinite(outputs).all():
        raise HfcompressError(f"{process.artifact.path} answers with values that are not finite")
    predictions, references = task.judge(outputs, rows.encoded.select(order))
    return predictions, references


def _row(
    process: ModelProcess,
    task: Any,
    quality: dict[str, float],
    interval: list[float],
    latency: list[dict[str, Any]],
    memory: int,
    energy: float | None,
) -> dict[str, Any]:
    artifact, shape = process.artifact, process.artifact.shape
    return {
        "stage": artifact.stage,
        "kind": artifact.kind,
        "quality": quality,
        "quality_interval": interval,
        "parameters": shape.parameters if shape else process.loaded["parameters"],
        "encoder_parameters": shape.encoder_parameters if shape else None,
        "disk_bytes": artifact.disk_bytes,
        "embedding_bytes": (sizes(artifact) or {}).get("embeddings"),
        "macs": shape.macs(task.max_length) if shape else None,
        "latency": latency,
        "peak_memory_bytes": memory,
        "energy_wh_per_1k": energy,
    }


def _against(row: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Adds how many times faster and smaller a row is than the source; null where the devices differ."""
    ratios = [
        round(theirs["p50_ms"] / own["p50_ms"], 4) if theirs["device"] == own["device"] else None
        for own, theirs in zip(row["latency"], source["latency"], strict=True)
    ]
    latency = [{**entry, "speedup": ratio} for entry, ratio in zip(row["latency"], ratios, strict=True)]
    compression = round(source["disk_bytes"] / row["disk_bytes"], 4)
    return {**row, "latency": latency, "speedup": ratios[0], "compression": compression}
