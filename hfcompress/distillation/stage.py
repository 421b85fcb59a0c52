"""The distill stage: a student learns from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.data.tasks import AnyTask
from hfcompress.data.texts import texts_of
from hfcompress.distillation.augmentation.options import Augment, augment_problems, augment_rows
from hfcompress.distillation.engine import train_student
from hfcompress.distillation.options import DistillationOptions
from hfcompress.distillation.student import Student
from hfcompress.distillation.wording import describe_length, describe_losses, describe_teachers, shorten_name
from hfcompress.models.artifact import Artifact, load_tokenizer, read_config
from hfcompress.models.shape import Shape
from hfcompress.training.options import Train
from hfcompress.training.task_heads import has_task_head, load_with_task_head
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown, code
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.local_models import LocalModel, LocalModels
    from hfcompress.data.task import Task


class Distill(Stage, DistillationOptions):
    """Trains a student to imitate a teacher.

    Without `student`, the model of the stage before is trained further, as in TinyBERT's prediction phase.
    """

    participle: ClassVar[str] = "distilled"
    makes_task_head: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    task: AnyTask | None = None
    """Another task than the recipe's: `fill-mask` on a corpus is general distillation. The report leaves this model
    out, and a later stage gives it the task head of the recipe's task."""
    student: Student | None = None
    augment: Augment | None = None
    """Adds rows to the train split."""
    train: Train = Train()

    def plan(self, shape: Shape) -> Shape:
        return self.student.shape(shape) if self.student else shape

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        found = [*self.student.problems(shape, task)] if self.student else []
        if self.task is not None:
            found += self.task.problems()
        if self.augment:
            found += self.augment.problems(task, self.needs_teacher)
        found += self.train.problems(task)
        if task.is_streamed and self.student and self.student.vocabulary == "corpus":
            message = "a streamed corpus is not read in advance, so its tokens are not known"
            found.append(Problem(message, "say `keep`, or leave `streaming` out", ("student", "vocabulary")))
        if not found:
            found += self.teacher_problems(self.plan(shape), known, task)
        return found

    def local_problems(self, models: LocalModels) -> list[Problem]:
        from hfcompress.distillation.teacher_checks import local_teacher_problems

        student, found = models.named.get(self.starts_from), super().local_problems(models)
        if found or student is None:
            return found
        if self.student and self.student.vocabulary == "corpus":
            found += models.vocabulary_problems(student, ("student", "vocabulary"))
        if self.augment:
            found += augment_problems(self.augment, models)
        return [*found, *local_teacher_problems(self, student, models)]

    def find_labels(self, start: LocalModel, models: LocalModels) -> Mapping[str, int] | None:
        source = models.named.get("source")
        return source.labels if source else None

    @property
    def starts_from(self) -> str:
        return self.student.origin if self.student else "parent"

    def steps(self, task: Task) -> int | None:
        rows = task.count_rows()
        copies = self.augment.copies * len(task.text) + 1 if self.augment else 1
        return self.train.steps(rows if rows is None else rows * copies)

    def unavailable(self) -> list[Problem]:
        return [*(self.student.unavailable() if self.student else []), *self.train.trackers_missing(("train",))]

    def specs(self) -> dict[Key, str]:
        named: dict[Key, str] = {("student", "from"): self.student.origin} if self.student else {}
        if self.augment:
            named[("augment", "model")] = self.augment.model
        return named | self.teacher_specs()

    def task_of(self, task: Task) -> Task:
        return self.task or task

    def describe(self) -> Markdown:
        corpus = f" on {code(shorten_name(self.task.dataset))}" if self.task else ""
        more = f", {self.augment.copies} new rows for each" if self.augment else ""
        length = f"{describe_length(self.train)}{more}"
        losses = describe_losses(self.losses)
        return Markdown(f"**distill**: learns from {describe_teachers(self)}{corpus} for {length}, by {losses}")

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        from hfcompress.training.lora import add_lora, merge_adapters

        origin = context.artifact(self.student.origin, parent) if self.student else parent
        require_trainable(origin, self.kind)
        facts, raw = dict[str, Any](), None
        if self.augment:
            raw, facts["augment"] = augment_rows(self.augment, self, parent, context)
        tokenizer, model = load_tokenizer(origin.path, context.task), self._load_origin(origin, parent, context)
        if self.student is not None:
            fresh_head = not has_task_head(read_config(origin.path), context.task)
            model, tokenizer, facts["student"] = self._build_student(
                self.student, model, tokenizer, context, raw, fresh_head
            )
        lora = self.student.lora if self.student else None
        student = add_lora(model, lora) if lora else model
        facts |= train_student(student, self, self.train, parent, context, tokenizer, raw)
        return context.finish(merge_adapters(model) if lora else model, tokenizer, facts)

    def _load_origin(self, origin: Artifact, parent: Artifact, context: StageContext) -> PreTrainedModel:
        """Loads the model that the student starts from; a new task head gets the labels of the source or a teacher."""
        teachers = [context.artifact(name, parent) for name in self.teacher_specs().values()]
        labelled = (
            model for model in (context.source, *teachers) if has_task_head(read_config(model.path), context.task)
        )
        return load_with_task_head(context.task, origin, fresh=True, like=next(labelled, None))

    def _build_student(
        self,
        wanted: Student,
        origin: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: StageContext,
        raw: datasets.Dataset | None,
        fresh_head: bool,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, str]]:
        """Builds the student; returns it, its tokenizer, and the origin of its weights by part."""
        from hfcompress.distillation.student_weights import build_student
        from hfcompress.distillation.width_importance import rank_dimensions
        from hfcompress.models import vocabulary
        from hfcompress.models.shape import shape_of

        old = shape_of(origin.config.to_dict())
        new = wanted.shape(old)
        report = {"head": "random"} if fresh_head else dict[str, str]()
        layers = wanted.layers_of(old)
        if new != old or layers != list(range(len(old.layers))) or wanted.init == "random":
            importance = None
            if wanted.width == "activation":
                importance = rank_dimensions(origin, self._sample_batches(wanted, origin, tokenizer, context))
            origin, report = build_student(origin, new, layers, wanted.init, importance, fresh_head)
        if wanted.vocabulary == "corpus":
            words = [context.rows("train") if raw is None else raw, context.rows("dev")]
            before = len(tokenizer)
            tokenizer, kept = vocabulary.prune_vocabulary(tokenizer, texts_of(words, context.task.text))
            origin = vocabulary.select_tokens(origin, kept, tokenizer)
            report["vocabulary"] = f"{len(kept):,} of {before:,} tokens"
        log.info("student: " + ("; ".join(f"{part} {how}" for part, how in report.items()) or "unchanged"))
        return origin, tokenizer, report

    def _sample_batches(self, wanted: Student, origin: Any, tokenizer: Any, context: StageContext) -> Any:
        from hfcompress.training.batches import make_batches

        rows = context.sample(wanted.rows, tokenizer, dict(origin.config.label2id or {}))
        return make_batches(rows, tokenizer, context.task)
