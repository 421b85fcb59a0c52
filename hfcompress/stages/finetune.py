"""A task head on a pre-trained model: how the source is made, where it does not exist yet."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from hfcompress.base.shape import Shape
from hfcompress.losses.hard_labels import HardLabels
from hfcompress.model.artifact import Artifact, load_model, load_tokenizer, read_config
from hfcompress.stages.base import Bench, Stage, require_trainable
from hfcompress.stages.train import Train


class Finetune(Stage):
    """Trains the recipe's model on the task's labels; `train: {epochs: 0}` takes a fine-tuned model as it is."""

    compresses: ClassVar[bool] = False

    kind: Literal["finetune"]
    train: Train = Train()

    def plan(self, shape: Shape) -> Shape:
        return shape

    def steps(self, rows: int | None) -> int | None:
        return self.train.steps(rows)

    def run(self, parent: Artifact, bench: Bench) -> None:
        require_trainable(parent, self.kind)
        from hfcompress.stages import training

        tokenizer = load_tokenizer(parent.path)
        model = load_model(parent.path, bench.task.auto_class, **self._head(parent, bench.task))
        labels = dict(model.config.label2id)
        rows = {split: bench.encoded(split, tokenizer, labels) for split in ("train", "dev")}  # type: ignore[arg-type]
        bench.notes["dev"] = training.train(
            model,
            [HardLabels()],
            self.train,
            task=bench.task,
            rows=rows,
            tokenizer=tokenizer,
            checkpoints=bench.checkpoints,
            seed=bench.seed,
            callbacks=bench.callbacks,
        )
        bench.finish(model, tokenizer)

    def _head(self, parent: Artifact, task: Any) -> dict[str, Any]:
        """Config changes for a fresh head; none where nothing is trained and the model's own head is taken."""
        if self.train.epochs == 0:
            return {}
        names = task.label_names()
        config = read_config(parent.path)
        own = config.get("id2label") or {}
        # A model that already names this many labels keeps its names: they are better than "0" and "1".
        if len(own) == len(names) and set(names) <= {*map(str, range(len(names))), *own.values()}:
            names = [own[str(i)] for i in range(len(names))]
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": task.problem_type,
        }
