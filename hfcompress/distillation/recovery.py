"""Recovery: the training in a prune or quantize stage, after the cut or under an overlay.

It is not in `training/`, because it needs the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from hfcompress.context import report_missing
from hfcompress.distillation.losses.soft_labels import SoftLabels
from hfcompress.distillation.options import DistillationOptions, Losses
from hfcompress.distillation.teachers import AnyTeachers, Teachers
from hfcompress.models.adapters import EXTRA, missing_modules
from hfcompress.models.shape import Shape
from hfcompress.training.lora import Lora, init_problems
from hfcompress.training.options import Train
from hfcompress.utils.errors import Problem

if TYPE_CHECKING:
    from hfcompress.data.task import Task


class Recover(Train, DistillationOptions):
    """A `train:` block with losses and a teacher."""

    epochs: float = Field(default=1.0, ge=0)
    losses: Losses = [SoftLabels()]
    teacher: AnyTeachers = Teachers(models=["parent"])
    """The teacher: `parent` (the model before this stage), `source`, an earlier stage, a directory or a Hub id; or
    several."""
    lora: Lora | None = None
    """Train LoRA adapters, which are merged before the model is saved."""

    def problems_of(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        """Lists the problems of training a model of this shape."""
        named = [replace(p, key=p.key[1:]) for p in self.problems(task)]
        return [*self.teacher_problems(shape, known, task), *named, *self._adapter_problems()]

    def _adapter_problems(self) -> list[Problem]:
        return [replace(p, key=("lora", *p.key)) for p in init_problems(self.lora)]

    def unavailable(self) -> list[Problem]:
        """Lists the packages that are not installed."""
        return [*(report_missing(missing_modules(), EXTRA) if self.lora else []), *self.trackers_missing()]
