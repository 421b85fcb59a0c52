"""Fewer bits a weight."""

from __future__ import annotations

from typing import Literal

from hfcompress.backends.base import AnyBackend
from hfcompress.base.shape import Shape
from hfcompress.model.artifact import Artifact, load_tokenizer
from hfcompress.model.probe import probe_inputs
from hfcompress.stages.base import Bench, Stage, on_main_process, require_trainable


class Quantize(Stage):
    """Stores the model as the backend does; nothing is trained."""

    kind: Literal["quantize"]
    backend: AnyBackend

    def plan(self, shape: Shape) -> Shape:
        return self.backend.plan(shape)

    def missing_modules(self) -> tuple[list[str], str]:
        return self.backend.missing_modules(), self.backend.extra

    def run(self, parent: Artifact, bench: Bench) -> None:
        require_trainable(parent, self.kind)
        on_main_process(lambda: self._write(parent, bench))

    def _write(self, parent: Artifact, bench: Bench) -> None:
        tokenizer = load_tokenizer(parent.path)
        target = bench.model_directory
        target.mkdir(parents=True, exist_ok=True)
        bench.logits = self.backend.quantize(parent.path, target, bench.task.auto_class, probe_inputs(parent.path))
        tokenizer.save_pretrained(target)
