"""A task head on a pre-trained model: how the source is made, where it does not exist yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from hfcompress.base.errors import Problem
from hfcompress.base.shape import Shape
from hfcompress.losses.hard_labels import HardLabels
from hfcompress.model.artifact import Artifact, load_tokenizer
from hfcompress.stages.base import Bench, Stage, require_trainable
from hfcompress.stages.heads import load_for
from hfcompress.stages.train import Train


class Finetune(Stage):
    """Trains the recipe's model on the task's labels; `train: {epochs: 0}` takes a fine-tuned model as it is."""

    compresses: ClassVar[bool] = False

    kind: Literal["finetune"]
    train: Train = Train()

    def plan(self, shape: Shape) -> Shape:
        return shape

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Any) -> list[Problem]:
        return self.train.problems(task)

    def steps(self, task: Any) -> int | None:
        return self.train.steps(task.rows())

    def run(self, parent: Artifact, bench: Bench) -> None:
        require_trainable(parent, self.kind)
        from hfcompress.stages import training

        tokenizer = load_tokenizer(parent.path, bench.task)
        # Nothing is trained where epochs is 0: the model's own head is taken.
        model = load_for(bench.task, parent, fresh=self.train.epochs > 0)
        labels = dict(model.config.label2id)
        rows = {split: bench.encoded(split, tokenizer, labels) for split in ("train", "dev")}  # type: ignore[arg-type]
        bench.notes["dev"] = training.train(
            training.Objective(model, [HardLabels()], bench.task),
            self.train,
            rows=rows,
            tokenizer=tokenizer,
            checkpoints=bench.checkpoints,
            seed=bench.seed,
            callbacks=bench.callbacks,
        )
        bench.finish(model, tokenizer)
