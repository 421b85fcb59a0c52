"""Runs a quantize stage: trains if the stage says so, then writes the quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, StageResult
from hfcompress.distillation.engine import train_student
from hfcompress.models.artifact import Artifact, label_ids, load_model, load_tokenizer, read_config, save_model
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.quantization.backends.base import QuantizationJob
from hfcompress.quantization.facts import QuantizationFacts
from hfcompress.utils.distributed import on_main_process, process_state

if TYPE_CHECKING:
    from hfcompress.measure.process import Batch
    from hfcompress.quantization.qat.options import QatTraining
    from hfcompress.quantization.stage import Quantize

BATCH = 16
"""The calibration rows in a batch."""


def quantize(stage: Quantize, parent: Artifact, context: StageContext) -> StageResult:
    """Runs the stage; called on every process of a distributed run.

    Args:
        stage: The stage's options.
        parent: The float model to quantize.
        context: The stage's context.
    """
    job = QuantizationJob(
        parent.path,
        context.model_directory,
        context.task.auto_class,
        make_dummy_inputs(parent.path),
        rows=partial(read_calibration_rows, parent, context),
    )
    facts = QuantizationFacts()
    if stage.train is not None and stage.backend.trains == "adapters":
        from hfcompress.quantization.qlora import train_adapters

        return train_adapters(stage.train, stage.backend, parent, context, job)
    if stage.train is not None:
        job, facts = train_quantization_aware(stage, stage.train, parent, context, job)
    written = list[StageResult]()
    on_main_process(lambda: written.append(_write(stage, context, job, facts)))
    return written[0] if written else StageResult(context.model_directory, facts.to_json())


def train_quantization_aware(
    stage: Quantize, train: QatTraining, parent: Artifact, context: StageContext, job: QuantizationJob
) -> tuple[QuantizationJob, QuantizationFacts]:
    """Trains the float model under fake quantization and saves it.

    Returns:
        The job of quantizing the trained model with its ranges, and the facts of the training.
    """
    model = load_model(parent.path, context.task.auto_class).to(process_state().device)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(parent.path, context.task)
    overlay = stage.backend.training_overlay(model, job, train.ranges, train.freeze)
    report = train_student(model, train, train, parent, context, tokenizer, masks=overlay)
    overlay.settle(model)
    path = context.directory / "trained"
    on_main_process(lambda: save_model(model.cpu(), tokenizer, path))
    return replace(job, source=path, ranges=overlay.ranges()), QuantizationFacts(training=report)


def _write(stage: Quantize, context: StageContext, job: QuantizationJob, facts: QuantizationFacts) -> StageResult:
    """Writes the quantized model and its tokenizer; on the first process."""
    job.target.mkdir(parents=True, exist_ok=True)
    if stage.max_drop is None:
        model, mixed = stage.backend.quantize(job), None
    else:
        from hfcompress.quantization.mixed_precision import search_mixed_precision

        model, mixed = search_mixed_precision(stage, job, context)
    reading = context.save_reading(load_tokenizer(job.source, context.task), label_ids(read_config(job.source)))
    facts = replace(facts, odd_weights=model.odd_weights, mixed=mixed)
    return StageResult(job.target, facts.to_json(), model.logits, reading)


def read_calibration_rows(parent: Artifact, context: StageContext, count: int) -> Sequence[Batch]:
    """Returns at most `count` rows of the train split, tokenized, in padded batches of similar length."""
    from hfcompress.measure.rows import TOKENS
    from hfcompress.training.batches import make_batches

    tokenizer = load_tokenizer(parent.path, context.task)
    rows = context.sample(count, tokenizer, label_ids(read_config(parent.path)))
    batches: Any = make_batches(rows, tokenizer, context.task, BATCH)
    return [{name: batch[name].numpy() for name in TOKENS if name in batch} for batch in batches]
