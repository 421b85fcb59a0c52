"""How a quantize stage goes: trained first where it says so, then stored, mixed where it may lose too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.backends.base import Work
from hfcompress.model.artifact import Artifact, label_ids, load_model, load_tokenizer, read_config, save_model
from hfcompress.model.probe import probe_inputs
from hfcompress.model.ranges import Ranges
from hfcompress.stages.aware import Aware
from hfcompress.stages.base import Bench, on_main_process, process_state
from hfcompress.stages.quantize import Quantize
from hfcompress.stages.teach import teach

if TYPE_CHECKING:
    from hfcompress.measure.process import Batch

BATCH = 16
"""Calibration rows of like length that are read together."""


@dataclass
class Quantizing:
    """One run of a quantize stage.

    Attributes:
        options: The stage.
        parent: The model as the stage gets it.
        bench: The stage's bench.
    """

    options: Quantize
    parent: Artifact
    bench: Bench

    def run(self) -> None:
        """Trains where the stage says so, and writes the quantized model."""
        train, backend = self.options.train, self.options.backend
        source, ranges = self.parent.path, None
        if train is not None and backend.trains == "adapters":
            from hfcompress.stages.qlora import qlora

            qlora(train, backend, self.parent, self.bench, self.work(source, self.bench.model_directory))
            return
        if train is not None:
            source, ranges = self._trained(train)
        on_main_process(lambda: self._write(source, ranges))

    def _write(self, source: Path, ranges: Ranges | None) -> None:
        target = self.bench.model_directory
        target.mkdir(parents=True, exist_ok=True)
        if self.options.max_drop is None:
            self.bench.logits = self.options.backend.quantize(self.work(source, target, ranges))
        else:
            from hfcompress.stages.mixed import mixed

            self.bench.logits = mixed(self.options, self.work(source, target, ranges), self.bench)
        self.bench.keep_reading(load_tokenizer(source, self.bench.task), label_ids(read_config(source)))

    def _trained(self, train: Aware) -> tuple[Path, Ranges | None]:
        """Where the model lies after quantization-aware training, and its ranges."""
        model = load_model(self.parent.path, self.bench.task.auto_class).to(process_state().device)  # type: ignore[arg-type]
        tokenizer = load_tokenizer(self.parent.path, self.bench.task)
        work = self.work(self.parent.path, self.bench.model_directory)
        masks = self.options.backend.masks(model, work, train.ranges, train.freeze)
        teach(model, train, train, self.parent, self.bench, tokenizer, masks=masks)
        masks.settle(model)
        path = self.bench.directory / "trained"
        on_main_process(lambda: save_model(model.cpu(), tokenizer, path))
        return path, masks.ranges()

    def work(self, source: Path, target: Path, ranges: Ranges | None = None) -> Work:
        """What the backend gets."""
        return Work(
            source,
            target,
            self.bench.task.auto_class,
            probe_inputs(source),
            self._rows,
            self._texts,
            ranges=ranges,
            notes=self.bench.notes,
        )

    def _rows(self, count: int) -> Sequence[Batch]:
        from hfcompress.measure.measure import TOKENS
        from hfcompress.stages import training

        tokenizer = load_tokenizer(self.parent.path, self.bench.task)
        rows = self.bench.sample(count, tokenizer, label_ids(read_config(self.parent.path)))
        batches = training.batches(rows, tokenizer, self.bench.task, BATCH)
        return [{name: batch[name].numpy() for name in TOKENS if name in batch} for batch in batches]

    def _texts(self, count: int) -> Sequence[str]:
        from itertools import islice

        from hfcompress.stages.texts import texts_of

        return list(islice(texts_of([self.bench.rows("train")], self.bench.task.text), count))
