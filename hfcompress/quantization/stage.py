"""The quantize stage: stores a model in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.distillation.wording import describe_training
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.artifact import Artifact, read_config
from hfcompress.models.shape import Shape, shape_of
from hfcompress.quantization import facts as card
from hfcompress.quantization.backends.base import AnyBackend
from hfcompress.quantization.qat.options import QatTraining
from hfcompress.quantization.rules import find_contradictions
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown, markdown

if TYPE_CHECKING:
    from hfcompress.data.local_models import LocalModel, LocalModels
    from hfcompress.data.task import Task
    from hfcompress.measure.hardware import Abilities


class Quantize(Stage):
    """Stores the model in fewer bits, as the backend does."""

    participle: ClassVar[str] = "quantized"
    relation: ClassVar[str] = "quantized"
    report_key: ClassVar[str] = "rounded"
    report_heading: ClassVar[str] = "What was rounded"
    reports: ClassVar[tuple[str, ...]] = ("mixed", "odd_weights", "loftq")
    ends_recipe: ClassVar[bool] = True

    kind: Literal["quantize"] = "quantize"
    backend: AnyBackend
    train: QatTraining | None = None
    """Train too: quantization-aware training before the model is quantized. With a bitsandbytes backend and `lora` it
    is QLoRA: adapters are trained on the quantized model. By default nothing is trained."""
    max_drop: float | None = Field(default=None, gt=0, le=100)
    """The points (hundredths) of the metric that may be lost on the dev split. The most sensitive linear layers stay in
    float32 until no more is lost. If every attempt loses more, the best one is kept. The card lists all attempts."""
    rows: int = Field(default=512, ge=1)
    """Dev rows to measure the sensitivity of each layer on, under `max_drop`; models are measured on all dev rows."""

    def plan(self, shape: Shape) -> Shape:
        planned = self.backend.plan(shape)
        return replace(planned, estimated=planned.estimated or self.max_drop is not None)

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        backend = [Problem(why, "", ("backend",)) for why in self.backend.problems(shape)]
        return [*backend, *find_contradictions(self), *self._training_problems(shape, known, task)]

    def _training_problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        if self.train is None or not self.backend.trains:
            return []
        found = self.train.problems_of(shape, known, task)
        if self.backend.trains == "fake_quantization":
            found += self.train.masked_problems()
        return _under("train", found)

    def local_problems(self, models: LocalModels) -> list[Problem]:
        from hfcompress.distillation.teacher_checks import local_teacher_problems

        start, found = models.named.get("parent"), super().local_problems(models)
        if found or start is None:
            return found
        taught = local_teacher_problems(self.train, start, models) if self.train else []
        return [*self._module_problems(start, models), *_under("train", taught)]

    def _module_problems(self, start: LocalModel, models: LocalModels) -> list[Problem]:
        """Returns the backend's problems with modules that the recipe names."""
        if not self.backend.says(*({"skip"} & {*type(self.backend).model_fields})):
            return []
        shape = shape_of(read_config(start.directory), head=models.task.head)
        adapted = self.train is not None and self.backend.trains == "adapters"
        head = ARCHITECTURES[shape.architecture].modules.task_heads[shape.head] if adapted else ()
        return _under("backend", self.backend.module_problems(models.without_weights(start), head))

    def steps(self, task: Task) -> int | None:
        return self.train.steps(task.count_rows()) if self.train else 0

    def specs(self) -> dict[Key, str]:
        return {("train", *key): name for key, name in self.train.teacher_specs().items()} if self.train else {}

    def unavailable(self) -> list[Problem]:
        why = self.backend.unavailable()
        own = [Problem(*why, key=("backend",))] if why else []
        return [*own, *_under("train", self.train.unavailable() if self.train else [])]

    @property
    def runs_on(self) -> tuple[str, ...]:
        return self.backend.runs_on

    def describe(self) -> Markdown:
        backend = self.backend
        chosen = [key for key in type(backend).model_fields if key in backend.model_fields_set]
        options = ", ".join(f"{key} {_spell(getattr(backend, key))}" for key in chosen)
        parts = [f"stores the weights by `{backend.name}`{f' with {options}' if options else ''} ({backend.source})"]
        if self.train is not None:
            what = "adapters on the quantized model" if backend.trains == "adapters" else "quantization-aware"
            parts.append(f"training first, {what}: {describe_training(self.train)}")
        if self.max_drop is not None:
            parts.append(f"layers left in float32 until at most {self.max_drop:g} points are lost on the dev split")
        return Markdown(f"**quantize**: {'; '.join(parts)}")

    def limits(self) -> list[str]:
        if not self.backend.rounds_by_batch:
            return []
        return [
            "Activations are quantized by batch: an answer near the border can change with the rows and the padding "
            "beside it."
        ]

    def advice(self, machine: Abilities) -> list[str]:
        return [f"backend: {self.backend.name}: {sentence}" for sentence in self.backend.advice(machine)]

    @classmethod
    def summarize(cls, facts: Mapping[str, Any]) -> list[Markdown]:
        return card.summarize(facts)

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        from hfcompress.quantization.engine import quantize

        require_trainable(parent, self.kind)
        return quantize(self, parent, context)


def _under(key: str, problems: list[Problem]) -> list[Problem]:
    """Puts a key before the key paths of problems."""
    return [replace(problem, key=(key, *problem.key)) for problem in problems]


def _spell(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else markdown(value)
