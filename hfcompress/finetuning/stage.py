"""The finetune stage: trains a pre-trained model for the task; the result is the source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.data.class_weights import ClassWeights
from hfcompress.distillation.losses.hard_labels import HardLabels
from hfcompress.distillation.wording import describe_length
from hfcompress.models.artifact import Artifact, load_tokenizer, read_config
from hfcompress.models.shape import Shape
from hfcompress.training.options import Train
from hfcompress.training.task_heads import label_names, load_with_task_head
from hfcompress.utils.errors import Problem
from hfcompress.utils.escape import Markdown

if TYPE_CHECKING:
    from hfcompress.data.local_models import LocalModel, LocalModels
    from hfcompress.data.task import Task


class Finetune(Stage):
    """Trains the recipe's model on the task's labels; `train: {epochs: 0}` keeps a fine-tuned model as it is."""

    compresses: ClassVar[bool] = False
    participle: ClassVar[str] = "fine-tuned"
    makes_task_head: ClassVar[bool] = True

    kind: Literal["finetune"] = "finetune"
    train: Train = Train()
    class_weights: ClassWeights = None
    """The weight of each class in the loss, for data in which some classes are rare: `balanced`
    (`n / (classes · count)`, from the train rows), or a mapping of class names to weights; other classes have
    weight 1."""

    def plan(self, shape: Shape) -> Shape:
        return shape

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        return [*self.train.problems(task), *self._loss.task_problems(task)]

    def local_problems(self, models: LocalModels) -> list[Problem]:
        found = super().local_problems(models)
        start = models.named.get(self.starts_from)
        if not found and start is not None and models.readable:
            found = self._loss.task_problems(models.task, self.find_labels(start, models))
        return found

    @property
    def trains_source_head(self) -> bool:
        return self.train.epochs > 0

    def find_labels(self, start: LocalModel, models: LocalModels) -> Mapping[str, int] | None:
        if not models.readable:
            return None
        if self.train.epochs == 0 and start.labels is not None:
            return start.labels
        return {name: index for index, name in enumerate(label_names(models.task, read_config(start.directory)))}

    def unavailable(self) -> list[Problem]:
        return self.train.trackers_missing(("train",))

    @property
    def _loss(self) -> HardLabels:
        return HardLabels(class_weights=self.class_weights)

    def steps(self, task: Task) -> int | None:
        return self.train.steps(task.count_rows())

    def describe(self) -> Markdown:
        if not self.train.epochs:
            return Markdown("**finetune**: nothing, the model stays as it is")
        return Markdown(f"**finetune**: trains on the task's labels for {describe_length(self.train)}")

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        require_trainable(parent, self.kind)
        from hfcompress.training import trainer
        from hfcompress.training.objective import Objective

        tokenizer = load_tokenizer(parent.path, context.task)
        # With 0 epochs nothing is trained, and the model keeps its own head.
        model = load_with_task_head(context.task, parent, fresh=self.train.epochs > 0)
        labels = dict(model.config.label2id)
        rows = {split: context.encode(split, tokenizer, labels) for split in ("train", "dev")}  # type: ignore[arg-type]
        state = self._loss.state_of(rows["train"], labels)
        dev = trainer.train(
            Objective(model, [self._loss], context.task, states=[state]),
            self.train,
            rows=rows,
            tokenizer=tokenizer,
            checkpoints=context.checkpoints,
            seed=context.seed,
            callbacks=context.callbacks,
        )
        return context.finish(model, tokenizer, {"dev": dev})
