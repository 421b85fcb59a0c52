"""Measures the quality, size, latency, memory and energy of all models in the same way, in one run.

Each model stays in a process of its own from the start to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pydantic import Field

from hfcompress.data.labels import names_by_id
from hfcompress.measure.answers import Answer, Answers, align
from hfcompress.measure.energy import AnyEnergy, measure_energy
from hfcompress.measure.environment import device_facts
from hfcompress.measure.plain_runtime import describe as describe_plain_runtime
from hfcompress.measure.plain_runtime import export_source
from hfcompress.measure.process import Batch, ModelProcess
from hfcompress.measure.seeds import AnySeeds
from hfcompress.measure.sizes import sizes
from hfcompress.measure.timing import Latency, time_models
from hfcompress.models.artifact import Artifact, label_ids, load_tokenizer, read_config
from hfcompress.models.weights import first_not_finite
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.margin import AnyMargin, Margin
from hfcompress.utils.price import AnyPrice
from hfcompress.utils.processors import default_threads, thread_counts
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray

    from hfcompress.data.task import Task

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
QUALITY_BATCH = {"sequence": 32, "token": 32, "span": 32, "mask": 8}
"""Rows in a batch when quality is measured; the logits of a mask head span the whole vocabulary for each token."""

PADDED_ROWS = 8
"""Rows that a model gets alone and, padded, in one batch."""
PADDING_TOLERANCE = 1e-3
"""Largest difference of these outputs, relative to the largest or 1: kernels round differently for other lengths."""


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
    """If a model runs in ONNX Runtime or OpenVINO, also time the source in ONNX Runtime, in float32, to tell how much
    of a speed-up is due to the runtime alone."""
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
    with _load_models(artifacts, task, options, progress) as (processes, encoded):
        latencies, timing = _time(processes, encoded, len(artifacts), options.latency, seed, progress)
        rows, answers = [], []
        for process, data, latency in zip(processes, encoded, latencies, strict=False):
            progress(f"{process.artifact.stage}: memory" + (", energy" if options.energy else "") + ", quality")
            memory = process.peak_bytes()
            energy = measure_energy(process) if options.energy else None
            require_padding_unread(process, data)
            answers.append(judge_rows(process, data))
            quality, interval = _score_answers(answers[-1], task, options.bootstrap, seed)
            rows.append(_make_row(process, task, quality, interval, latency, memory, energy))
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
    with _load_models(artifacts, task, alone, lambda _: None) as (processes, encoded):
        answers = [judge_rows(process, data) for process, data in zip(processes, encoded, strict=True)]
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
    with _load_models(artifacts, task, options, progress) as (processes, encoded):
        latencies, timing = _time(processes, encoded, len(artifacts), options.latency, seed, progress)
    rows = [
        {**row, "latency": latency, "speedup": latency[0]["speedup"]}
        for row, latency in zip(content["rows"], latencies, strict=True)
    ]
    return {**content, **timing, "rows": rows}


def _time(
    processes: Sequence[ModelProcess],
    encoded: Sequence[Rows],
    models: int,
    options: Latency,
    seed: int,
    progress: Callable[[str], None],
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Times the models; a process more than there are models holds the source in another runtime.

    Returns:
        For each model an entry for each batch size; and `machine` and `plain_runtime` of the report.
    """
    plain = len(processes) > models
    latencies, state = time_models(processes, encoded, options, seed, progress, plain)
    latencies = [_note_dtype(process, latency) for process, latency in zip(processes, latencies, strict=True)]
    timing = {"machine": _describe_machine(state, options)}
    if plain:
        timing["plain_runtime"] = describe_plain_runtime(latencies[-1])
    return latencies[:models], timing


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
) -> Iterator[tuple[list[ModelProcess], list[Rows]]]:
    """Loads each model in a process of its own, and encodes the judged rows with its tokenizer.

    A last process may hold the source in another runtime (`plain_runtime.export_source`).
    """
    rows = task.read(task.judged_split())
    threads = options.latency.threads or default_threads()
    with ExitStack() as stack:
        exported = export_source(artifacts, task, options.latency.device) if options.plain_runtime else nullcontext()
        plain = stack.enter_context(exported)
        artifacts = [*artifacts, *([plain] if plain else [])]
        progress("loading every model in a process of its own")
        processes = [
            stack.enter_context(ModelProcess(a, task.auto_class, options.latency.device, threads, task.head))
            for a in artifacts
        ]
        yield (
            processes,
            [Rows(task, load_tokenizer(a.path, task), rows, label_ids(read_config(a.path))) for a in artifacts],
        )


class Rows:
    """The judged rows, encoded with one model's tokenizer."""

    def __init__(self, task: Task, tokenizer: Any, rows: datasets.Dataset, labels: Mapping[str, int]) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.encoded: datasets.Dataset = task.encode(rows, tokenizer, labels)

    def batches(self, groups: Iterable[Sequence[int]], names: Sequence[str] = TOKENS) -> Iterator[Batch]:
        """Makes a batch of arrays from each group of rows, padded to the longest row of the group."""
        for group in groups:
            batch = self.task.batch(self.encoded.__getitems__(list(group)), self.tokenizer)
            yield {name: batch[name].numpy() for name in names if name in batch}


def _score_answers(answer: Answer, task: Task, samples: int, seed: int) -> tuple[dict[str, float], list[float]]:
    predictions, references = answer.predictions, answer.references
    low, high = task.interval(predictions, references, samples, seed)
    return {task.metric_name: task.score(predictions, references), "n": len(references)}, [low, high]


def judge_rows(process: ModelProcess, rows: Rows) -> Answer:
    """Computes a model's answers to all rows, in the order of the data; rows of similar length share a batch.

    Raises:
        HfcompressError: if a logit of the model is not finite.
    """
    import numpy as np

    task, lengths = rows.task, np.asarray(rows.encoded["length"][:])
    order, size = np.argsort(lengths, kind="stable"), QUALITY_BATCH[task.head]
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    outputs = process.logits(rows.batches(groups, (*TOKENS, "labels")))
    if not np.isfinite(outputs).all():
        raise HfcompressError(
            f"{process.artifact.path} answers with values that are not finite{_name_odd_tensor(process.artifact)}",
            "train or quantize the model again, or start from an earlier checkpoint",
        )
    outputs = _restore_order(outputs, order, lengths, by_token=task.head in ("token", "span"))
    predictions, references = task.judge(outputs, rows.encoded)
    classes = task.head == "sequence" and task.type != "regression"
    return Answer(predictions, references, outputs if classes else None, lengths if task.head != "span" else None)


def _restore_order(outputs: NDArray[Any], order: NDArray[Any], lengths: NDArray[Any], by_token: bool) -> NDArray[Any]:
    """Outputs in the order of the data.

    Args:
        outputs: One a row, or one a token of each row, in the order in which the rows were read.
        order: The numbers of the rows in that order.
        lengths: Tokens of each row, in the order of the data.
        by_token: True for outputs of tokens.
    """
    import numpy as np

    place = np.argsort(order)
    if not by_token:
        return outputs[place]
    parts = np.split(outputs, np.cumsum(lengths[order])[:-1])
    return np.concatenate([parts[number] for number in place])


def require_padding_unread(process: ModelProcess, rows: Rows) -> None:
    """Requires that a float model gives a few rows of all lengths the same logits alone and padded to the longest.

    It passes every quantized model, because the grid of its inputs can depend on the whole batch.

    Args:
        process: The model.
        rows: The judged rows.

    Raises:
        HfcompressError: for a model whose logits depend on padding.
    """
    import numpy as np

    if process.dtype != "float32":
        return
    order = np.argsort(np.asarray(rows.encoded["length"][:]), kind="stable")
    few = [int(order[i]) for i in sorted({*np.linspace(0, len(order) - 1, PADDED_ROWS).round().astype(int)})]
    names = (*TOKENS, "labels")
    alone, together = (process.logits(rows.batches(groups, names)) for groups in ([[row] for row in few], [few]))
    if rows.task.head == "mask":  # the count of right answers may change with a tie, so only the loss is compared
        alone, together = alone[:, 2], together[:, 2]
    difference = float(np.abs(alone - together).max(initial=0.0)) / max(1.0, float(np.abs(alone).max(initial=0.0)))
    if not difference <= PADDING_TOLERANCE:
        raise HfcompressError(
            f"{process.artifact.path} answers differently (by {difference:.2g}) once a row is padded to the length of "
            "another, so its quality would depend on the batch",
            "see which token its config.json and its tokenizer pad with, and on which side the model was trained to "
            "be padded; hfcompress pads on the right",
        )


def _name_odd_tensor(artifact: Artifact) -> str:
    """Names the first weights of an ONNX graph that are not finite; loading has checked those of a PyTorch model."""
    found = first_not_finite(artifact.path / artifact.choice.file) if artifact.runtime == "onnx" else None
    return f": its weights {found} are not" if found else ""


def _make_row(
    process: ModelProcess,
    task: Task,
    quality: dict[str, float],
    interval: list[float],
    latency: list[dict[str, Any]],
    memory: int,
    energy: dict[str, Any] | None,
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
        "energy_wh_per_1k": energy and energy["wh_per_1k"],
        **({"energy": energy} if energy else {}),
    }


def _compare(row: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Adds the speed-up at the first batch size and the compression, both relative to the source."""
    compression = round(source["disk_bytes"] / row["disk_bytes"], 4)
    return {**row, "speedup": row["latency"][0]["speedup"], "compression": compression}
