"""Fewer bits a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.artifact import Artifact, read_config
from hfcompress.models.shape import Shape, shape_of
from hfcompress.quantization.backends.base import BACKENDS, AnyBackend
from hfcompress.quantization.description import describe, limits, summarize
from hfcompress.quantization.qat.options import QatTraining
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.local_models import LocalModel, LocalModels
    from hfcompress.measure.hardware import Abilities


class Quantize(Stage):
    """Stores the model as the backend does."""

    ends_recipe: ClassVar[bool] = True
    tag: ClassVar[str] = "quantization"
    relation: ClassVar[str] = "quantized"
    report_key: ClassVar[str] = "rounded"
    report_heading: ClassVar[str] = "What was rounded"
    reports: ClassVar[tuple[str, ...]] = ("mixed", "odd_weights", "loftq")

    kind: Literal["quantize"] = "quantize"
    backend: AnyBackend
    train: QatTraining | None = None
    """Training first: quantization-aware, where the backend's rounding can be felt while the model trains; of LoRA
    adapters on the quantized model (QLoRA) with `lora` and a bitsandbytes backend. None where it is left out."""
    max_drop: float | None = Field(default=None, gt=0, le=100)
    """Points (hundredths) of the metric that the dev split may lose at most: the linear layers that suffer most stay
    in float32 until it holds. The best attempt is kept even where none holds, and all are noted."""
    rows: int = Field(default=512, ge=1)
    """Dev rows that each layer alone is judged on under `max_drop`; attempts are judged on all of them."""

    def plan(self, shape: Shape) -> Shape:
        planned = self.backend.plan(shape)
        return replace(planned, estimated=planned.estimated or self.max_drop is not None)

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        found = [Problem(why, "", ("backend",)) for why in self.backend.problems(shape)]
        if self.max_drop is not None and not self.backend.mixed:
            able = ", ".join(name for name in BACKENDS.names() if BACKENDS.get(name).mixed)
            message = f"{self.backend.name} has no way to leave layers in float32"
            found.append(Problem(message, f"leave `max_drop` out, or use one of {able}", ("max_drop",)))
        if self.max_drop is None and self.says("rows"):
            found.append(Problem("`rows` is for `max_drop`", "leave it out", ("rows",)))
        return [*found, *self._training_problems(shape, known, task)]

    def _training_problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        train, trains = self.train, self.backend.trains
        if train is None:
            return []
        if not trains:
            able = ", ".join(name for name in BACKENDS.names() if BACKENDS.get(name).trains)
            message = f"{self.backend.name} takes no training"
            return [Problem(message, f"leave `train` out, or use one of {able}", ("train",))]
        found = [replace(p, key=("train", *p.key)) for p in train.problems_of(shape, known, task)]
        if trains == "adapters" and self.max_drop is not None:
            message = "adapters are trained on one quantized model, and `max_drop` makes several"
            found.append(Problem(message, "leave one of them out", ("max_drop",)))
        if trains == "adapters" and train.lora is None:
            message = f"the weights of {self.backend.name} are fixed, and there are no adapters to train on them"
            found.append(Problem(message, "say `lora: {r: 8}`", ("train", "lora")))
        if trains == "fake_quantization" and train.lora:
            message = "quantization-aware training is of all weights"
            found.append(Problem(message, "leave it out, or use bnb_4bit", ("train", "lora")))
        if trains == "fake_quantization":
            found += [replace(problem, key=("train", *problem.key)) for problem in train.masked_problems()]
        if why := self.backend.untrainable():
            found.append(Problem(why, "leave `per_channel` or `train` out, or say `mode: static`", ("train",)))
        known_ranges = self.backend.trained_ranges
        for key in train.says("ranges", "freeze") if not known_ranges else ():
            message = f"`{key}` is for fixed ranges of a layer's inputs, which this backend has not"
            found.append(Problem(message, "leave it out, or use onnx_int8 with `mode: static`", ("train", key)))
        if known_ranges and train.ranges not in known_ranges:
            message = "steps are learned of 8-bit weights, channel by channel"
            fix = "leave `per_channel` and `reduce_range` out, or say `ranges: ema`"
            found.append(Problem(message, fix, ("train", "ranges")))
        return found

    def local_problems(self, models: LocalModels) -> list[Problem]:
        from hfcompress.distillation.teacher_checks import local_teacher_problems

        start, found = models.named.get("parent"), super().local_problems(models)
        if found or start is None:
            return found
        found += self._module_problems(start, models)
        problems = local_teacher_problems(self.train, start, models) if self.train else []
        return [*found, *(replace(problem, key=("train", *problem.key)) for problem in problems)]

    def _module_problems(self, start: LocalModel, models: LocalModels) -> list[Problem]:
        """What the backend says of modules that the recipe names."""
        if not self.backend.says(*({"skip"} & {*type(self.backend).model_fields})):
            return []
        shape = shape_of(read_config(start.directory), head=models.task.head)
        adapted = self.train is not None and self.backend.trains == "adapters"
        head = ARCHITECTURES[shape.architecture].modules.task_heads[shape.head] if adapted else ()
        problems = self.backend.module_problems(models.without_weights(start), head)
        return [replace(problem, key=("backend", *problem.key)) for problem in problems]

    def steps(self, task: Task) -> int | None:
        return self.train.steps(task.rows()) if self.train else 0

    def specs(self) -> dict[Key, str]:
        return {("train", *key): name for key, name in self.train.teacher_specs().items()} if self.train else {}

    def unavailable(self) -> list[Problem]:
        why = self.backend.unavailable()
        own = [Problem(*why, key=("backend",))] if why else []
        problems = self.train.unavailable() if self.train else []
        return [*own, *(replace(problem, key=("train", *problem.key)) for problem in problems)]

    @property
    def runs_on(self) -> tuple[str, ...]:
        return self.backend.runs_on

    def describe(self) -> Markdown:
        return describe(self)

    def limits(self) -> list[str]:
        return limits(self)

    def advice(self, machine: Abilities) -> list[str]:
        from hfcompress.measure.hardware import advice

        return [f"backend: {self.backend.name}: {line}" for line in advice(machine, self.backend.name)]

    @classmethod
    def summarize(cls, facts: Mapping[str, Any]) -> list[Markdown]:
        return summarize(facts)

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        from hfcompress.quantization.engine import Quantizing

        require_trainable(parent, self.kind)
        return Quantizing(self, parent, context).run()
