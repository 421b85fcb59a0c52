"""Mixed precision: leaves the most sensitive layers in float32, as few as an accuracy budget allows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.quality import judge_rows
from hfcompress.measure.rows import Rows
from hfcompress.models.architectures import spec_of
from hfcompress.models.artifact import label_ids, load_model, load_tokenizer, open_artifact, read_config
from hfcompress.models.linears import linears
from hfcompress.quantization.backends.base import QuantizationJob, QuantizedModel
from hfcompress.quantization.facts import Attempt, LayerSensitivity, MixedPrecision
from hfcompress.utils.files import replace_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfcompress.quantization.stage import Quantize


@dataclass
class Search:
    """The state of a search.

    Attributes:
        stage: The stage's options, with `max_drop`.
        job: The float model, and where the chosen model goes.
        context: The stage's context.
        tokenizer: The float model's.
        rows: The dev rows that models are judged on.
        float_metric: The float model's metric on them.
        tried: The attempts so far.
        models: The quantized model of each attempt.
    """

    stage: Quantize
    job: QuantizationJob
    context: StageContext
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    float_metric: float
    tried: list[Attempt] = field(default_factory=list)
    models: list[QuantizedModel] = field(default_factory=list)

    def directory(self, index: int) -> Path:
        """Returns the directory of an attempt's model until one is chosen."""
        return self.context.directory / "attempts" / str(index)


def search_mixed_precision(
    stage: Quantize, job: QuantizationJob, context: StageContext
) -> tuple[QuantizedModel, MixedPrecision]:
    """Writes the quantized model that stays within the budget with the fewest layers in float32.

    It ranks layers by the change of the logits when only one of them is quantized. Then it quantizes models with 0, 1,
    2, 4, … of the first layers in float32 until one stays within the budget, and bisects between the last two. If none
    does, it writes the model that loses least.

    Args:
        stage: The stage's options, with `max_drop`.
        job: The model to quantize, and the target directory.
        context: The stage's context.

    Returns:
        The written model, and the result of the search.
    """
    search = start_search(stage, job, context)
    ranked: list[LayerSensitivity] = []
    first = quantize_without(search, ())
    if stays_within(search, first):
        log.info(f"quantize: all layers are quantized, {first.drop:+.2f} points lost of {stage.max_drop} allowed")
    else:
        ranked = rank_layers(search)

        def is_enough(count: int) -> bool:
            keep = [path for layer in ranked[:count] for path in layer.layers]
            return stays_within(search, quantize_without(search, keep))

        find_fewest(len(ranked), is_enough)
    best = choose(search)
    holds = stays_within(search, best)
    if not holds:
        log.info(f"quantize: every attempt loses more than {stage.max_drop} points; the best loses {best.drop:.2f}")
    result = MixedPrecision(
        metric=context.task.metric_name,
        float=search.float_metric,
        max_drop=stage.max_drop or 0.0,
        holds=holds,
        kept=best.keep,
        tried=tuple(search.tried),
        layers=tuple(ranked),
    )
    return move_chosen(search, best), result


def find_fewest(most: int, is_enough: Callable[[int], bool]) -> None:
    """Searches the smallest count that is enough, with few calls of `is_enough`; larger counts are enough too.

    Args:
        most: The largest count; 0 is known to be too few.
        is_enough: Returns true if so many layers in float32 are enough.
    """
    low, high = 0, 1
    while high < most and not is_enough(high):
        low, high = high, min(2 * high, most)
    if high == most and not is_enough(most):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)


def start_search(stage: Quantize, job: QuantizationJob, context: StageContext) -> Search:
    """Reads the dev rows, measures the float model, and calibrates once for all attempts."""
    job = replace(job, ranges=stage.backend.calibrate(job))
    tokenizer = load_tokenizer(job.source, context.task)
    rows = Rows(context.task, tokenizer, context.rows("dev"), label_ids(read_config(job.source)))
    return Search(stage, job, context, tokenizer, rows, _measure(job.source, rows, context))


def stays_within(search: Search, attempt: Attempt) -> bool:
    """True if the attempt loses at most `max_drop` points."""
    assert search.stage.max_drop is not None
    return attempt.drop <= search.stage.max_drop + 1e-9


def quantize_without(search: Search, keep: Sequence[str]) -> Attempt:
    """Quantizes all layers except these and measures the model; the same attempt is made only once."""
    known = next((attempt for attempt in search.tried if attempt.keep == tuple(keep)), None)
    if known is not None:
        return known
    target, task = search.directory(len(search.tried)), search.context.task
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model = search.stage.backend.quantize(replace(search.job, target=target, keep=frozenset(keep)))
    metric = _measure(target, search.rows, search.context)
    sign = 1 if task.greater_is_better else -1
    drop = round(100 * sign * (search.float_metric - metric), 6)
    attempt = Attempt(tuple(keep), metric, drop, open_artifact(target).disk_bytes)
    search.models.append(model)
    search.tried.append(attempt)
    log.info(f"quantize: {len(keep)} layers in float32, {task.metric_name} {metric:.4f}, {drop:+.2f} points lost")
    return attempt


def choose(search: Search) -> Attempt:
    """Returns the smallest attempt within the budget, else the one that loses least."""
    within = [attempt for attempt in search.tried if stays_within(search, attempt)]
    return min(within, key=lambda a: (a.bytes, a.drop)) if within else min(search.tried, key=lambda a: a.drop)


def move_chosen(search: Search, best: Attempt) -> QuantizedModel:
    """Renames the directory of the chosen model to the job's target, and deletes the others."""
    index = search.tried.index(best)
    replace_directory(search.directory(index), search.job.target)
    shutil.rmtree(search.directory(index).parent)
    return search.models[index]


def rank_layers(search: Search) -> list[LayerSensitivity]:
    """Measures the effect of quantizing each linear layer alone, and sorts the layers by it, the largest first."""
    import numpy as np

    from hfcompress.training.evaluate import predict

    task, backend = search.context.task, search.stage.backend
    count = min(search.stage.rows, len(search.rows.encoded))
    rows = search.rows.encoded.shuffle(seed=search.context.seed).select(range(count))
    model = load_model(search.job.source, task.auto_class)
    groups = group_fused_layers(model) if backend.fuses else [(path,) for path in linears(model)]
    log.info(f"quantize: measures {len(groups)} layers or groups of layers, each alone, on {count} dev rows")
    plain, order = predict(model, rows, search.tokenizer, task)
    found = []
    for paths in groups:
        with backend.simulate(model, paths, search.job):
            outputs, _ = predict(model, rows, search.tokenizer, task)
        error = float(np.linalg.norm(outputs - plain)) / max(float(np.linalg.norm(plain)), 1e-12)
        found.append(LayerSensitivity(paths, error, float(task.score(*task.judge(outputs, rows.select(order))))))
    return sorted(found, key=lambda layer: -layer.error)


def group_fused_layers(model: Any) -> list[tuple[str, ...]]:
    """Groups the paths of linear layers that read the same tensor: queries, keys and values; an FFN and its gate."""
    modules = spec_of(model).modules
    parts = ({modules.query, modules.key, modules.value}, {modules.ffn_in, modules.ffn_gate} - {""})
    found: dict[str, list[str]] = {}
    for path in linears(model):
        name = path
        for number, names in enumerate(parts):
            own = next((n for n in names if path.endswith(f".{n}")), None)
            name = f"{path.removesuffix(own)}{number}" if own else name
        found.setdefault(name, []).append(path)
    return [tuple(paths) for paths in found.values()]


def _measure(path: Path, rows: Rows, context: StageContext) -> float:
    """Returns the metric of a saved model on the dev rows, in a process of its own."""
    task = context.task
    with ModelProcess(open_artifact(path), task.auto_class, head=task.head) as process:
        answer = judge_rows(process, rows)
        return float(task.score(answer.predictions, answer.references))
