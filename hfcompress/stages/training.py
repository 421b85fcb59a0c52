"""The one training path: a student, its losses and perhaps a teacher, under `transformers.Trainer`.

Torch is imported with this file, so stages import it when they run, never when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from hfcompress.base.console import say
from hfcompress.base.shape import shape_of
from hfcompress.data.metrics import LOWER_IS_BETTER, metric
from hfcompress.losses.base import Loss, Step
from hfcompress.model.observe import Observed, observe
from hfcompress.stages.base import process_state
from hfcompress.stages.train import Train

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Objective(nn.Module):
    """A student and its losses as one module, so that DDP and checkpoints see the learned projections too."""

    accepts_loss_kwargs = False  # the loss is a per-batch mean: the Trainer divides it by the accumulated batches

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[Loss],
        task: Any,
        teacher: PreTrainedModel | None,
        layer_map: Sequence[int],
    ) -> None:
        super().__init__()
        self.student = student
        names = [loss.name for loss in losses]
        keys = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        self.losses = dict(zip(keys, losses, strict=True))
        self.task = task
        self.layer_map = tuple(layer_map)
        self.needs = frozenset().union(*(loss.needs for loss in losses))
        self.learned = nn.ModuleDict()
        if teacher is not None:
            shapes = shape_of(student.config.to_dict()), shape_of(teacher.config.to_dict())
            made = {key: loss.learned(*shapes) for key, loss in self.losses.items()}
            self.learned.update({key: module for key, module in made.items() if module is not None})

    def forward(
        self, labels: Tensor | None = None, teacher: Observed | None = None, **inputs: Tensor
    ) -> dict[str, Any]:
        """The logits, the weighted sum of the losses, and each loss by name.

        In eval mode the loss is the task's own, so that what is watched does not depend on what is trained.
        """
        if not self.training:
            logits = observe(self.student, inputs).logits
            return {"loss": self.task.loss(logits, labels), "logits": logits}
        observed = observe(self.student, inputs, self.needs)
        mask = inputs["attention_mask"].bool()
        step = Step(observed, teacher, mask, labels, self.layer_map, self.task)
        learned = dict(self.learned.items())
        parts = {key: loss.weight * loss.compute(step, learned.get(key)) for key, loss in self.losses.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), "logits": observed.logits, "parts": parts}


class LengthGrouped(LengthGroupedSampler):
    """Rows of like length together, shuffled anew each epoch by the seed alone.

    A resumed run and one on more processes (of an equal global batch) see the same batches as any other.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class CompressionTrainer(Trainer):
    """A Trainer whose step lets the teacher look at the batch first."""

    def __init__(
        self, *args: Any, teacher: PreTrainedModel | None = None, length_grouping: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.length_grouping = length_grouping
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self._parts: dict[str, Tensor] = {}
        self._counted = 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss on a batch."""
        taught = self._taught(inputs) if model.training else None
        outputs = model(teacher=taught, **inputs)
        if model.training:
            self._count(outputs["parts"])
        loss = outputs["loss"]
        return (loss, {"loss": loss, "logits": outputs["logits"]}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.length_grouping:
            return super()._get_train_sampler()
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(step, dataset["length"][:], self.args.seed)

    def _taught(self, inputs: Mapping[str, Tensor]) -> Observed | None:
        if self.teacher is None:
            return None
        tokens = {name: value for name, value in inputs.items() if name != "labels"}
        objective: Any = self.accelerator.unwrap_model(self.model)
        with torch.inference_mode(), self.accelerator.autocast():
            seen = observe(self.teacher, tokens, objective.needs)
        # Inference tensors cannot be saved for backward; their copies can.
        return Observed(
            seen.logits.clone(),
            *(tuple(t.clone() for t in some) for some in (seen.hidden_states, seen.queries, seen.keys)),
        )

    def _count(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach()
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        self._counted += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss since the last log; the only place where they leave the device."""
        if self._counted and "loss" in logs and len(self._parts) > 1:
            means = {name: round(float(value) / self._counted, 4) for name, value in self._parts.items()}
            logs = {**logs, **{f"loss_{name}": mean for name, mean in means.items()}}
        if "loss" in logs:
            self._parts, self._counted = {}, 0
        super().log(logs, start_time)


class _Batch:
    """Pads rows to the longest of the batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, multiple: int | None = None) -> None:
        self.tokenizer, self.multiple = tokenizer, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name not in ("length", "labels")]
        batch = self.tokenizer.pad(
            {name: [row[name] for row in rows] for name in names},
            padding=True,
            pad_to_multiple_of=self.multiple,
            return_tensors="pt",
        )
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def batches(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> list[dict[str, Tensor]]:
    """All rows in batches of like length."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    pad = _Batch(tokenizer)
    groups = (order[i : i + batch_size] for i in range(0, len(order), batch_size))
    return [pad([rows[i] for i in group]) for group in groups]


def train(
    student: PreTrainedModel,
    losses: Sequence[Loss],
    options: Train,
    *,
    task: Any,
    rows: Mapping[str, datasets.Dataset],
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Path,
    seed: int,
    teacher: PreTrainedModel | None = None,
    layer_map: Sequence[int] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Trains the student in place, going on from the last whole checkpoint if there is one.

    Returns:
        The student's metric on the dev rows.
    """
    torch.manual_seed(seed)
    needs_teacher = any(loss.needs_teacher for loss in losses)
    objective = Objective(student, losses, task, teacher if needs_teacher else None, layer_map)
    arguments = training_arguments(
        options, checkpoints, seed, len(rows["train"]), task.metric, unused_parameters(losses)
    )
    trainer = CompressionTrainer(
        objective,
        arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["dev"],
        data_collator=_Batch(tokenizer, 8 if arguments.device.type == "cuda" else None),
        compute_metrics=lambda seen: _judge(task, seen.predictions, seen.label_ids),
        callbacks=list(callbacks),
        teacher=teacher if needs_teacher else None,
        length_grouping=options.length_grouping,
    )
    if options.epochs > 0:
        resumed = last_checkpoint(checkpoints)
        if resumed:
            say(f"resuming from {resumed.name}")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    score = trainer.evaluate()[f"eval_{task.metric}"]
    student.eval()
    return float(score)


def _judge(task: Any, logits: Any, labels: Any) -> dict[str, float]:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return metric(task.metric).compute(predictions=task.predictions(logits), references=labels)


def score(model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Any) -> float:
    """A model's metric on encoded rows."""
    import numpy as np

    model = model.to(process_state().device).eval()
    logits, labels = [], []
    with torch.inference_mode():
        for batch in batches(rows, tokenizer, 64):
            labels.append(batch.pop("labels").numpy())
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            logits.append(observe(model, inputs).logits.float().cpu().numpy())
    return _judge(task, np.concatenate(logits), np.concatenate(labels))[task.metric]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the Trainer writes trainer_state.json last)."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def unused_parameters(losses: Sequence[Loss]) -> bool:
    """Whether some parameters get no gradient: the head, where no loss looks at the logits."""
    return all(loss.needs for loss in losses)


def training_arguments(
    options: Train, folder: Path, seed: int, rows: int, metric_name: str, find_unused: bool = False
) -> TrainingArguments:
    """The only place where a `train:` block becomes `TrainingArguments`."""
    steps = options.steps(rows, process_state().num_processes) or 1
    strategy = "no" if options.epochs == 0 else "steps" if options.checkpoint_steps else "epoch"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=max(options.batch_size, 64),
        gradient_accumulation_steps=options.gradient_accumulation,
        warmup_steps=round(options.warmup * steps),
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused",
        **_precision(options.precision),
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy=strategy,
        save_steps=options.checkpoint_steps or 500,
        save_total_limit=1,
        eval_strategy=strategy if options.keep_best else "no",
        eval_steps=options.checkpoint_steps,
        load_best_model_at_end=options.keep_best and strategy != "no",
        metric_for_best_model=metric_name,
        greater_is_better=metric_name not in LOWER_IS_BETTER,
        logging_steps=options.logging_steps,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=process_state().device.type == "cpu",
        ddp_find_unused_parameters=find_unused,
        disable_tqdm=False,
        report_to=options.report_to or "none",
        seed=seed,
    )


def _precision(wanted: str) -> dict[str, bool]:
    if wanted == "auto":
        wanted = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return {"bf16": wanted == "bfloat16", "fp16": wanted == "float16"}
