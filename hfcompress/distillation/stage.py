"""A student learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.base.console import say
from hfcompress.base.errors import Key, Problem
from hfcompress.base.shape import Shape
from hfcompress.data.tasks import Task
from hfcompress.model.artifact import Artifact, load_tokenizer, read_config
from hfcompress.stages.augment import Augment, augment_problems, augmented_rows
from hfcompress.stages.base import Bench, Stage, require_trainable
from hfcompress.stages.heads import has_head, load_for
from hfcompress.stages.student import Student
from hfcompress.stages.taught import Taught
from hfcompress.stages.teach import teach
from hfcompress.stages.texts import texts_of
from hfcompress.stages.train import Train

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.stages.local import Locals


class Distill(Stage, Taught):
    """Trains a student on what a teacher shows it.

    Without `student` the model of the stage before goes on learning, which is how TinyBERT's prediction phase follows
    its intermediate phase.
    """

    kind: Literal["distill"]
    task: Task | None = None
    """Another task than the recipe's: `fill-mask` on a corpus is general distillation. The stage's model is not part of
    the report, and a later stage puts the recipe's head on it."""
    student: Student | None = None
    augment: Augment | None = None
    """More rows to learn from."""
    train: Train = Train()

    def plan(self, shape: Shape) -> Shape:
        return self.student.shape(shape) if self.student else shape

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Any) -> list[Problem]:
        found = [*self.student.problems(shape, task)] if self.student else []
        if self.task is not None:
            found += self.task.problems()
        if self.augment:
            found += self.augment.problems(task, self.asks)
        found += self.train.problems(task)
        if task.streamed and self.student and self.student.vocabulary == "corpus":
            message = "a corpus that is streamed is not read through for the tokens that it uses"
            found.append(Problem(message, "say `keep`, or leave `streaming` out", ("student", "vocabulary")))
        if not found:
            found += self.taught_problems(self.plan(shape), known, task)
        return found

    def local_problems(self, models: Locals) -> list[Problem]:
        from hfcompress.stages.local import local_taught_problems

        student, found = models.named.get(self.starts_from), super().local_problems(models)
        if found or student is None:
            return found
        if self.student and self.student.vocabulary == "corpus":
            found += models.vocabulary_problems(student, ("student", "vocabulary"))
        if self.augment:
            found += augment_problems(self.augment, models)
        return [*found, *local_taught_problems(self, student, models)]

    @property
    def starts_from(self) -> str:
        return self.student.origin if self.student else "parent"

    def steps(self, task: Any) -> int | None:
        rows = task.rows()
        copies = self.augment.copies * len(task.text) + 1 if self.augment else 1
        return self.train.steps(rows if rows is None else rows * copies)

    def unavailable(self) -> list[Problem]:
        return [*(self.student.unavailable() if self.student else []), *self.train.trackers_missing(("train",))]

    def specs(self) -> dict[Key, str]:
        named: dict[Key, str] = {("student", "from"): self.student.origin} if self.student else {}
        if self.augment:
            named[("augment", "model")] = self.augment.model
        return named | self.teacher_specs()

    def task_of(self, task: Any) -> Any:
        return self.task or task

    def run(self, parent: Artifact, bench: Bench) -> None:
        from hfcompress.model.lora import add_lora, merged

        origin = bench.artifact(self.student.origin, parent) if self.student else parent
        require_trainable(origin, self.kind)
        raw = augmented_rows(self.augment, self, parent, bench) if self.augment else None
        tokenizer, model = load_tokenizer(origin.path, bench.task), self._with_head(origin, parent, bench)
        if self.student is not None:
            fresh_head = not has_head(read_config(origin.path), bench.task)
            model, tokenizer = self._student(self.student, model, tokenizer, bench, raw, fresh_head)
        lora = self.student.lora if self.student else None
        teach(add_lora(model, lora) if lora else model, self, self.train, parent, bench, tokenizer, raw)
        bench.finish(merged(model) if lora else model, tokenizer)

    def _with_head(self, origin: Artifact, parent: Artifact, bench: Bench) -> PreTrainedModel:
        """The model that the student starts from; a new head has the labels of the source, or of a teacher."""
        teachers = [bench.artifact(name, parent) for name in self.teacher_specs().values()]
        labelled = (model for model in (bench.source, *teachers) if has_head(read_config(model.path), bench.task))
        return load_for(bench.task, origin, fresh=True, like=next(labelled, None))

    def _student(
        self,
        wanted: Student,
        origin: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        bench: Bench,
        raw: datasets.Dataset | None,
        fresh_head: bool,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The student before its training, and its tokenizer; notes where its weights come from."""
        from hfcompress.base.shape import shape_of
        from hfcompress.model import vocabulary
        from hfcompress.model.student import build_student
        from hfcompress.model.width import rank_dimensions

        old = shape_of(origin.config.to_dict())
        new = wanted.shape(old)
        report = {"head": "random"} if fresh_head else dict[str, str]()
        layers = wanted.layers_of(old)
        if new != old or layers != list(range(len(old.layers))) or wanted.init == "random":
            importance = None
            if wanted.width == "activation":
                importance = rank_dimensions(origin, self._calibration(wanted, origin, tokenizer, bench))
            origin, report = build_student(origin, new, layers, wanted.init, importance, fresh_head)
        if wanted.vocabulary == "corpus":
            words = [bench.rows("train") if raw is None else raw, bench.rows("dev")]
            before = len(tokenizer)
            tokenizer, kept = vocabulary.prune_vocabulary(tokenizer, texts_of(words, bench.task.text))
            origin = vocabulary.select_tokens(origin, kept, tokenizer)
            report["vocabulary"] = f"{len(kept):,} of {before:,} tokens"
        bench.notes["student"] = report
        say("student: " + ("; ".join(f"{part} {how}" for part, how in report.items()) or "as it came"))
        return origin, tokenizer

    def _calibration(self, wanted: Student, origin: Any, tokenizer: Any, bench: Bench) -> Any:
        from hfcompress.stages import training

        rows = bench.sample(wanted.rows, tokenizer, dict(origin.config.label2id or {}))
        return training.batches(rows, tokenizer, bench.task)
