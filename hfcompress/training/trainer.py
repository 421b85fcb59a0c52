"""Trains an objective, with or without teachers, by `transformers.Trainer`.

This file imports torch, so stages import it when they run, not when a recipe is read.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hfcompress.training.arguments import make_arguments
from hfcompress.training.batches import SHARES, TEACHERS, Collator, SeededLengthSampler
from hfcompress.training.checkpoints import find_best_checkpoint, find_last_checkpoint, remove_others, seal
from hfcompress.training.evaluate import score
from hfcompress.training.objective import Objective
from hfcompress.training.options import Train, count_rows
from hfcompress.training.overlay import STEADY
from hfcompress.training.progress import Progress
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hfcompress.distillation.teachers import TeacherEnsemble


class _TellEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells the collator the number of the epoch, since masks are drawn again in each epoch."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


class _TellStep(TrainerCallback):  # type: ignore[misc]
    """Tells the overlay that a step is done, before a checkpoint of it is written."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.objective.masks is not None:
            self.objective.masks.after_step(self.objective.student, state.global_step, state.max_steps)


class CompressionTrainer(Trainer):
    """A Trainer that asks the teachers before each step, and trains a student under an overlay."""

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        *,
        options: Train,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        teachers: TeacherEnsemble | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.teachers = None if teachers is None else teachers.to(arguments.device)
        # Not named `tokenizer`, which is a property of older Trainers.
        self.student_tokenizer, self.length_grouping = tokenizer, options.length_grouping
        collator = Collator(objective.task, tokenizer, teachers, arguments.device.type == "cuda")
        super().__init__(
            objective,
            arguments,
            train_dataset=rows["train"],
            eval_dataset=rows["dev"],
            data_collator=collator,
            callbacks=[_TellStep(objective), *callbacks, _TellEpoch(collator)],
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress())
        self._parts: dict[str, Tensor] = {}
        self._steps_counted = 0.0
        self._in_step = 1

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Draws the batches of the next step, and adds to each its weight in the step's means.

        In a plain mean, batches with few labels or short rows would count as much as the others.
        """
        samples, count = super().get_batch_samples(*args, **kwargs)
        self._in_step = max(len(samples), 1)
        if samples and len(samples) * self.accelerator.num_processes > 1:
            objective: Any = self.accelerator.unwrap_model(self.model)
            units = torch.stack([objective.units(batch) for batch in samples]).to(self.args.device)
            of_all = self.accelerator.reduce(units.sum(0), "sum")
            shares = weigh_batches(units, of_all, len(samples) * self.accelerator.num_processes)
            samples = [{**batch, SHARES: share} for batch, share in zip(samples, shares, strict=True)]
        return samples, count

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Asks the teachers about a batch, and computes the objective's loss."""
        objective: Any = self.accelerator.unwrap_model(self.model)
        shares = inputs.get(SHARES)
        outputs = model(progress=self._progress, shares=shares, **ask_teachers(objective, self.teachers, inputs))
        self._count(outputs["parts"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Computes the student's metric on the dev rows, under its overlay in eval mode.

        All processes share the rows, and all get the same metric; see `training.evaluate`.
        """
        objective: Any = self.accelerator.unwrap_model(self.model).eval()
        with objective.under_overlay(self._progress):
            found = score(objective.student, self.eval_dataset, self.student_tokenizer, objective.task, shared=True)
        metrics = {f"{metric_key_prefix}_{objective.task.metric_name}": found}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint, seals it once every process has written its part, and then removes older ones."""
        folder = Path(self.args.output_dir)
        if not folder.is_dir():  # if the run directory was removed, the Trainer would make it again
            raise FileNotFoundError(errno.ENOENT, "the directory of the checkpoints is gone", str(folder))
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = folder / f"checkpoint-{self.state.global_step}"
            seal(written)
            remove_others(folder, written, self.state.best_model_checkpoint)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Makes the optimizer of the model, with the parameter groups of the overlay."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in self._overlay_groups if fresh else ():
            own = {id(parameter) for parameter in group["params"]}
            for other in optimizer.param_groups:
                other["params"] = [p for p in other["params"] if id(p) not in own]
            optimizer.add_param_group(dict(group))
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the learning rate schedule; a parameter group with `STEADY` keeps its learning rate."""
        fresh = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(*args, **kwargs)
        for index, group in enumerate(scheduler.optimizer.param_groups if fresh else ()):
            if group.get(STEADY):
                scheduler.lr_lambdas[index] = _keep_rate
                group["lr"] = group["initial_lr"]
        return scheduler

    def create_accelerator_and_postprocess(self) -> None:
        """Clips the gradients of the model without those of the overlay, which would use up its norm."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_model(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            masks = {id(p) for group in self._overlay_groups for p in group["params"]}
            return clip([p for p in parameters if id(p) not in masks], *args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_model

    @property
    def _overlay_groups(self) -> list[dict[str, Any]]:
        objective: Any = self.accelerator.unwrap_model(self.model)
        return [] if objective.masks is None else objective.masks.parameter_groups()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.length_grouping:
            return super()._get_train_sampler()
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SeededLengthSampler(step, dataset["length"][:], self.args.seed)

    def _count(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach() / self._in_step
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        self._steps_counted += 1 / self._in_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs also the mean of each loss over the steps since the last log, on all processes.

        The losses stay on the device until here.
        """
        if self._steps_counted and "loss" in logs and len(self._parts) > 1:
            sums = self.accelerator.reduce(torch.stack(list(self._parts.values())), "mean").tolist()
            means = {name: round(value / self._steps_counted, 4) for name, value in zip(self._parts, sums, strict=True)}
            logs = {**logs, **{f"loss_{name}": mean for name, mean in means.items()}}
        if "loss" in logs:
            self._parts, self._steps_counted = {}, 0.0
        super().log(logs, start_time)


def weigh_batches(units: Tensor, of_all: Tensor, batches: int) -> Tensor:
    """Computes the weight of each batch in its step, whose loss is the mean over its batches.

    Args:
        units: `(batches of this process, losses)`: the number of units of each loss in each batch.
        of_all: `(losses,)`: the number of units in the whole step, on all processes.
        batches: The number of batches in the step, on all processes.

    Returns:
        `(batches of this process, losses)`: the factors of the means of the batches.
    """
    return units * batches / of_all.clamp(min=torch.finfo(of_all.dtype).tiny)


def _keep_rate(_step: int) -> float:
    return 1.0


def ask_teachers(objective: Objective, teachers: TeacherEnsemble | None, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Turns a collated batch into the arguments of the objective, with the outputs of the teachers."""
    inputs = {name: value for name, value in batch.items() if name not in (SHARES, TEACHERS)}
    if teachers is None:
        return inputs
    tokens = {name: value for name, value in inputs.items() if name != "labels"}
    outputs = teachers.ask(tokens, batch.get(TEACHERS, ()), objective.needs, objective.teacher_layers)
    return {**inputs, "teacher": outputs}


def train(
    objective: Objective,
    options: Train,
    *,
    rows: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Path,
    seed: int,
    teachers: TeacherEnsemble | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Trains the objective's student in place, from the last complete checkpoint if there is one.

    Args:
        objective: The student, its losses and its overlay.
        options: The `train:` block.
        rows: Encoded rows of `train` and `dev`.
        tokenizer: The student's tokenizer.
        checkpoints: The directory of the checkpoints.
        seed: The seed of batches, dropout and overlay.
        teachers: The teachers; None if no loss needs one.
        callbacks: `transformers` callbacks.

    Returns:
        The student's metric on the dev rows, under its overlay.

    Raises:
        HfcompressError: for `keep_best` with an overlay that changes the model step by step.
    """
    torch.manual_seed(seed)
    if objective.masks is not None:
        if objective.masks.closing and (problems := options.masked_problems()):
            raise HfcompressError(problems)
        objective.masks.seed = seed
    task, count = objective.task, count_rows(rows["train"])
    arguments = make_arguments(
        options,
        checkpoints,
        seed,
        count,
        task.metric_name,
        task.greater_is_better,
        objective.leaves_parameters_unused,
    )
    trainer = CompressionTrainer(
        objective, arguments, options=options, rows=rows, tokenizer=tokenizer, teachers=teachers, callbacks=callbacks
    )
    if options.epochs > 0:
        resumed = _find_checkpoint(checkpoints)
        if resumed:
            log.info(f"resuming from {resumed.name}")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    found = trainer.evaluate()[f"eval_{task.metric_name}"]
    objective.student.eval()
    return float(found)


def _find_checkpoint(checkpoints: Path) -> Path | None:
    """Finds the last complete checkpoint, on the first process, and removes the others."""
    found: Path | None = broadcast(find_last_checkpoint(checkpoints) if process_state().is_main_process else None)
    on_main_process(lambda: remove_others(checkpoints, found, find_best_checkpoint(found) if found else None))
    return found


def check_first_step(
    objective: Objective, teachers: TeacherEnsemble | None, rows: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Computes the loss and its gradients on two rows, before any epoch: this finds a broken loss within seconds.

    Raises:
        HfcompressError: for a loss that is not finite, or a projection that gets no gradient.
    """
    from accelerate.utils import send_to_device

    device = process_state().device
    collator = Collator(objective.task, tokenizer, teachers, device.type == "cuda")
    batch = send_to_device(collator(list(islice(rows, 2))), device)
    objective.to(device).train()
    teachers = None if teachers is None else teachers.to(device)
    outputs = objective(progress=0.5, **ask_teachers(objective, teachers, batch))  # a weight may start or end at 0
    outputs["loss"].backward()
    broken = [name for name, part in outputs["parts"].items() if not bool(part.isfinite())]
    dead = [name for name, p in objective.learned.named_parameters() if p.grad is None or not bool(p.grad.any())]
    objective.zero_grad(set_to_none=True)
    if broken:
        raise HfcompressError(
            f"the loss {broken[0]} is not finite on the first rows", "look for NaN in the weights of both models"
        )
    if dead:
        loss = dead[0].partition(".")[0]
        raise HfcompressError(
            f"the projection of {loss} gets no gradient: nothing would train it",
            "give the loss a weight above 0 and a layer map that names the layer, or `projection: shared`",
        )
