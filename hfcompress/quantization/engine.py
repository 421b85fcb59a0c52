"""How a quantize stage goes: trained first where it says so, then stored, mixed where it may lose too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, StageResult
from hfcompress.distillation.engine import train_student
from hfcompress.models.artifact import Artifact, label_ids, load_model, load_tokenizer, read_config, save_model
from hfcompress.models.dummy_inputs import probe_inputs
from hfcompress.quantization.backends.base import Work
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.quantization.qat.options import QatTraining
from hfcompress.utils.distributed import on_main_process, process_state

if TYPE_CHECKING:
    from hfcompress.measure.process import Batch
    from hfcompress.quantization.stage import Quantize

BATCH = 16
"""Calibration rows of like length that are read together."""


@dataclass
class Quantizing:
    """One run of a quantize stage.

    Attributes:
        options: The stage.
        parent: The model as the stage gets it.
        context: The stage's context.
    """

    options: Quantize
    parent: Artifact
    context: StageContext

    def __post_init__(self) -> None:
        self.facts = dict[str, Any]()

    def run(self) -> StageResult:
        """Trains where the stage says so, and writes the quantized model."""
        train, backend = self.options.train, self.options.backend
        source, ranges = self.parent.path, None
        if train is not None and backend.trains == "adapters":
            from hfcompress.quantization.qlora import qlora

            return qlora(train, backend, self.parent, self.context, self.work(source, self.context.model_directory))
        if train is not None:
            source, ranges = self._trained(train)
        written = list[StageResult]()
        on_main_process(lambda: written.append(self._write(source, ranges)))
        return written[0] if written else StageResult(self.context.model_directory, self.facts)

    def _write(self, source: Path, ranges: Ranges | None) -> StageResult:
        target = self.context.model_directory
        target.mkdir(parents=True, exist_ok=True)
        if self.options.max_drop is None:
            logits = self.options.backend.quantize(self.work(source, target, ranges))
        else:
            from hfcompress.quantization.mixed_precision import mixed

            logits = mixed(self.options, self.work(source, target, ranges), self.context)
        labels = label_ids(read_config(source))
        reading = self.context.save_reading(load_tokenizer(source, self.context.task), labels)
        return StageResult(target, self.facts, logits, reading)

    def _trained(self, train: QatTraining) -> tuple[Path, Ranges | None]:
        """Where the model lies after quantization-aware training, and its ranges."""
        model = load_model(self.parent.path, self.context.task.auto_class).to(process_state().device)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(self.parent.path, self.context.task)
        work = self.work(self.parent.path, self.context.model_directory)
        masks = self.options.backend.masks(model, work, train.ranges, train.freeze)
        found = train_student(model, train, train, self.parent, self.context, tokenizer, masks=masks)
        self.facts.update(found)
        masks.settle(model)
        path = self.context.directory / "trained"
        on_main_process(lambda: save_model(model.cpu(), tokenizer, path))
        return path, masks.ranges()

    def work(self, source: Path, target: Path, ranges: Ranges | None = None) -> Work:
        """What the backend gets."""
        return Work(
            source,
            target,
            self.context.task.auto_class,
            probe_inputs(source),
            self._rows,
            self._texts,
            ranges=ranges,
            facts=self.facts,
        )

    def _rows(self, count: int) -> Sequence[Batch]:
        from hfcompress.measure.measure import TOKENS
        from hfcompress.training.batches import make_batches

        tokenizer = load_tokenizer(self.parent.path, self.context.task)
        rows = self.context.sample(count, tokenizer, label_ids(read_config(self.parent.path)))
        batches = make_batches(rows, tokenizer, self.context.task, BATCH)
        return [{name: batch[name].numpy() for name in TOKENS if name in batch} for batch in batches]

    def _texts(self, count: int) -> Sequence[str]:
        from itertools import islice

        from hfcompress.data.texts import texts_of

        return list(islice(texts_of([self.context.rows("train")], self.context.task.text), count))
