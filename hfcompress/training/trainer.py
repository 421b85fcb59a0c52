"""The one training path: a student, its losses and perhaps teachers, under `transformers.Trainer`.

Torch is imported with this file, so stages import it when they run, never when they are read.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from hfcompress.data.metrics import LOWER_IS_BETTER
from hfcompress.measure.worker import reduced
from hfcompress.models.forward import Observed, observe
from hfcompress.models.shape import Shape, shape_of
from hfcompress.training.checkpoints import best_of, last_checkpoint, remove_others, seal
from hfcompress.training.loss import TAUGHT, Loss, Pairs, Step, Units
from hfcompress.training.options import Train, row_count
from hfcompress.training.overlay import STEADY, TrainingOverlay
from hfcompress.utils.distributed import agreed, on_main_process, process_state
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.distillation.teachers import TeacherEnsemble


SHARES = "shares"
"""The entry of a batch that says what it counts in its step."""


class Objective(nn.Module):
    """A student, its losses and its masks as one module, so that DDP and checkpoints see all that is learned."""

    accepts_loss_kwargs = False  # the Trainer divides the loss by the accumulated batches

    def __init__(
        self,
        student: PreTrainedModel,
        losses: Sequence[Loss],
        task: Task,
        teacher: Shape | None = None,
        pairs: Pairs = (),
        dynamic: bool = False,
        masks: TrainingOverlay | None = None,
        states: Sequence[Tensor | None] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.masks = masks
        names = [loss.name for loss in losses]
        keys = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
        self.losses = dict(zip(keys, losses, strict=True))
        self.task, self.pairs, self.dynamic = task, pairs, dynamic
        self.needs = frozenset[str]().union(*(loss.needs for loss in losses))
        for key, state in zip(keys, states, strict=bool(states)):
            self.register_buffer(f"state_of_{key}", state, persistent=False)
        self.learned = nn.ModuleDict()
        self.layers = self.taught_layers = frozenset[int]()
        if teacher is not None:
            self._meet(shape_of(student.config.to_dict()), teacher)
        self.register_state_dict_post_hook(_what_moves)
        self.register_load_state_dict_pre_hook(_all_of_it)

    def _meet(self, student: Shape, teacher: Shape) -> None:
        """Makes what the losses learn, and finds the layers that they look at."""
        looked_at = [p for x in self.losses.values() if x.needs for p in x.layers(student, teacher, self.pairs)]
        self.layers, self.taught_layers = frozenset(m for m, _ in looked_at), frozenset(g for _, g in looked_at)
        for key, loss in self.losses.items():
            module, name = loss.learned(student, teacher), loss.learned_as(key)
            if module is not None and name not in self.learned:
                self.learned[name] = module

    def forward(
        self,
        labels: Tensor | None = None,
        teacher: Observed | None = None,
        progress: float = 0.0,
        shares: Tensor | None = None,
        **inputs: Tensor,
    ) -> dict[str, Any]:
        """The weighted sum of the losses, and each loss by name; what the masks ask for is called `mask`.

        Args:
            labels: As the task's `batch` makes them.
            teacher: What the teachers show of the same batch.
            progress: Share of the steps that are done, for weights and masks that change.
            shares: `(losses,)`: what the batch's mean of each loss counts in its step, see `step_shares`; None where a
                step is one batch.
            **inputs: Token tensors.
        """
        with self.masked(progress):
            observed = observe(self.student, inputs, self.needs, self.layers)
            penalty = None if self.masks is None else self.masks.penalty(progress)
        mask = inputs["attention_mask"].bool()
        step = Step(observed, teacher, mask, labels, self.pairs, self.task, self.dynamic)
        learned = dict(self.learned.items())
        parts = {
            key: loss.weight_at(progress)
            * loss.compute(replace(step, state=self._state(key)), learned.get(loss.learned_as(key)))
            for key, loss in self.losses.items()
        }
        if shares is not None:
            parts = {key: part * share for (key, part), share in zip(parts.items(), shares, strict=True)}
        if penalty is not None:
            parts["mask"] = penalty
        return {"loss": torch.stack(list(parts.values())).sum(), "parts": parts}

    def units(self, batch: Mapping[str, Tensor]) -> Tensor:
        """`(losses,)`: what each loss is the mean over, of a collated batch."""
        found = Units(batch["attention_mask"].bool(), batch.get("labels"), self.task)
        return torch.stack([loss.units(replace(found, state=self._state(key))) for key, loss in self.losses.items()])

    def _state(self, key: str) -> Tensor | None:
        """What a loss was told of the train rows."""
        state: Tensor | None = getattr(self, f"state_of_{key}", None)
        return state

    def masked(self, progress: float) -> AbstractContextManager[None]:
        """The masks lie over the student's forward passes while the context lasts."""
        return nullcontext() if self.masks is None else self.masks.applied(self.student, progress)


def _what_moves(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leaves in a checkpoint what the training changes, by one name each: safetensors takes no second one.

    What is frozen a resumed training has as it was; the state of a quantized layer it could not take back.
    """
    moved = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    kept = {prefix + name for name in (*moved, *(name for name, _ in module.named_buffers()))}
    for name in set(state) - kept:
        del state[name]


def _all_of_it(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    again = _second_names(module)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in again:
            state[prefix + name] = state[prefix + again[name]]
        elif not parameter.requires_grad:
            state.setdefault(prefix + name, parameter.detach())


def _second_names(module: nn.Module) -> dict[str, str]:
    """Further names of tensors, and the first of each: a mask head's weights are the embeddings'."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(tensor)] for name, tensor in named if first.setdefault(id(tensor), name) != name}


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


class Collator:
    """Makes a batch of rows as the task says, with what cached teachers answered to them."""

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, teaching: TeacherEnsemble | None, on_gpu: bool
    ) -> None:
        self.task, self.tokenizer, self.teaching = task, tokenizer, teaching
        self.multiple = 8 if on_gpu else None
        self.epoch = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = self.task.batch(rows, self.tokenizer, self.multiple, self.epoch)
        index = batch.pop("index")
        if self.teaching is None:
            return batch
        return {**batch, **self.teaching.attach(index, batch["input_ids"].shape[1], self.multiple)}


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells the collator which epoch it is, for what is drawn anew in each."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0)


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells the masks of each step, before a checkpoint is written of it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.objective.masks is not None:
            self.objective.masks.stepped(self.objective.student, state.global_step, state.max_steps)


class CompressionTrainer(Trainer):
    """A Trainer whose step lets the teachers look at the batch first, and whose model may be masked."""

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        *,
        options: Train,
        rows: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        teaching: TeacherEnsemble | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.teaching = None if teaching is None else teaching.to(arguments.device)
        # Not `tokenizer`, which is a property of older Trainers.
        self.words, self.length_grouping = tokenizer, options.length_grouping
        collator = Collator(objective.task, tokenizer, teaching, arguments.device.type == "cuda")
        super().__init__(
            objective,
            arguments,
            train_dataset=rows["train"],
            eval_dataset=rows["dev"],
            data_collator=collator,
            callbacks=[_Steps(objective), *callbacks, _Epochs(collator)],
        )
        self._parts: dict[str, Tensor] = {}
        self._steps_counted = 0.0
        self._in_step = 1

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step; each carries what it counts in the step's means.

        Batches of few labels or short rows would weigh as much as others if a step were the mean of their means.
        """
        samples, count = super().get_batch_samples(*args, **kwargs)
        self._in_step = max(len(samples), 1)
        if samples and len(samples) * self.accelerator.num_processes > 1:
            objective: Any = self.accelerator.unwrap_model(self.model)
            units = torch.stack([objective.units(batch) for batch in samples]).to(self.args.device)
            total = self.accelerator.reduce(units.sum(0), "sum")
            shares = step_shares(units, total, len(samples) * self.accelerator.num_processes)
            samples = [{**batch, SHARES: share} for batch, share in zip(samples, shares, strict=True)]
        return samples, count

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss on a batch."""
        objective: Any = self.accelerator.unwrap_model(self.model)
        tokens = {name: value for name, value in inputs.items() if name != SHARES}
        outputs = model(progress=self._progress, shares=inputs.get(SHARES), **taught(objective, self.teaching, tokens))
        self._count(outputs["parts"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """The student's metric on the dev rows, under its masks as they would end now.

        Every process of a distributed run scores all of them alike.
        """
        objective: Any = self.accelerator.unwrap_model(self.model).eval()
        with objective.masked(self._progress):
            found = score(objective.student, self.eval_dataset, self.words, objective.task)
        metrics = {f"{metric_key_prefix}_{objective.task.metric}": found}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Seals a checkpoint once every process has written its share; those before it go only then."""
        folder = Path(self.args.output_dir)
        if not folder.is_dir():  # the Trainer would make it again, in a run directory that was removed
            raise FileNotFoundError(errno.ENOENT, "the directory of the checkpoints is gone", str(folder))
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = folder / f"checkpoint-{self.state.global_step}"
            seal(written)
            remove_others(folder, written, self.state.best_model_checkpoint)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The model's optimizer, with the masks' own groups."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        for group in self._mask_groups if fresh else ():
            own = {id(parameter) for parameter in group["params"]}
            for other in optimizer.param_groups:
                other["params"] = [p for p in other["params"] if id(p) not in own]
            optimizer.add_param_group(dict(group))
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The model's schedule; a group of masks that is `STEADY` keeps its learning rate."""
        fresh = self.lr_scheduler is None
        scheduler: Any = super().create_scheduler(*args, **kwargs)
        for index, group in enumerate(scheduler.optimizer.param_groups if fresh else ()):
            if group.get(STEADY):
                scheduler.lr_lambdas[index] = _unchanged
                group["lr"] = group["initial_lr"]
        return scheduler

    def create_accelerator_and_postprocess(self) -> None:
        """Clips the model's gradients alone: those of masks would eat up the norm that the model's may have."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def clip_model(parameters: Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            masks = {id(p) for group in self._mask_groups for p in group["params"]}
            return clip([p for p in parameters if id(p) not in masks], *args, **kwargs)

        self.accelerator.clip_grad_norm_ = clip_model

    @property
    def _mask_groups(self) -> list[dict[str, Any]]:
        objective: Any = self.accelerator.unwrap_model(self.model)
        return [] if objective.masks is None else objective.masks.parameter_groups()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.length_grouping:
            return super()._get_train_sampler()
        dataset = self.train_dataset if train_dataset is None else train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(step, dataset["length"][:], self.args.seed)

    def _count(self, parts: Mapping[str, Tensor]) -> None:
        for name, value in parts.items():
            value = value.detach() / self._in_step
            self._parts[name] = self._parts[name] + value if name in self._parts else value
        self._steps_counted += 1 / self._in_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss over the steps since the last log and over all processes.

        The only place where they leave the device.
        """
        if self._steps_counted and "loss" in logs and len(self._parts) > 1:
            sums = self.accelerator.reduce(torch.stack(list(self._parts.values())), "mean").tolist()
            means = {name: round(value / self._steps_counted, 4) for name, value in zip(self._parts, sums, strict=True)}
            logs = {**logs, **{f"loss_{name}": mean for name, mean in means.items()}}
        if "loss" in logs:
            self._parts, self._steps_counted = {}, 0.0
        super().log(logs, start_time)


def step_shares(units: Tensor, total: Tensor, batches: int) -> Tensor:
    """What each batch's means count in those of its step, where the step's loss is the mean over its batches.

    Args:
        units: `(batches of this process, losses)`: what each loss is the mean over in each batch.
        total: `(losses,)`: the same of the whole step, all processes.
        batches: Batches of the step, all processes.
    """
    return units * batches / total.clamp(min=torch.finfo(total.dtype).tiny)


def _unchanged(_step: int) -> float:
    return 1.0


def taught(objective: Objective, teaching: TeacherEnsemble | None, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """A collated batch as the objective takes it, with what the teachers show of it."""
    own = {name: value for name, value in batch.items() if not name.startswith(TAUGHT)}
    if teaching is None:
        return own
    tokens = {name: value for name, value in batch.items() if name != "labels"}
    return {**own, "teacher": teaching.ask(tokens, objective.needs, objective.taught_layers)}


def batches(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int = 32
) -> Iterator[dict[str, Tensor]]:
    """All rows in batches of like length."""
    for group in _like_lengths(rows, batch_size):
        yield task.batch(rows.__getitems__(group), tokenizer)


def _like_lengths(rows: datasets.Dataset, batch_size: int) -> list[list[int]]:
    lengths = rows["length"][:]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def train(
    objective: Objective,
    options: Train,
    *,
    rows: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    checkpoints: Path,
    seed: int,
    teaching: TeacherEnsemble | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Trains the objective's student in place, going on from the last whole checkpoint if there is one.

    Args:
        objective: The student, its losses and its masks.
        options: The `train:` block.
        rows: Encoded rows of `train` and `dev`.
        tokenizer: The student's.
        checkpoints: Where the state to resume from is kept.
        seed: Draws the batches, the dropout and what the masks sample.
        teaching: The teachers, where a loss asks them.
        callbacks: `transformers` callbacks.

    Returns:
        The student's metric on the dev rows, under its masks.

    Raises:
        HfcompressError: where the best model is to be kept and masks close.
    """
    torch.manual_seed(seed)
    if objective.masks is not None:
        if objective.masks.closing and (problems := options.masked_problems()):
            raise HfcompressError(problems)
        objective.masks.seed = seed
    metric = objective.task.metric
    arguments = training_arguments(
        options, checkpoints, seed, row_count(rows["train"]), metric, unused_parameters(objective)
    )
    trainer = CompressionTrainer(
        objective, arguments, options=options, rows=rows, tokenizer=tokenizer, teaching=teaching, callbacks=callbacks
    )
    if options.epochs > 0:
        resumed = _resumed_from(checkpoints)
        if resumed:
            log.info(f"resuming from {resumed.name}")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    found = trainer.evaluate()[f"eval_{metric}"]
    objective.student.eval()
    return float(found)


def _resumed_from(checkpoints: Path) -> Path | None:
    """The last whole checkpoint, as the first process finds it; what else is there is removed."""
    found: Path | None = agreed(last_checkpoint(checkpoints) if process_state().is_main_process else None)
    on_main_process(lambda: remove_others(checkpoints, found, best_of(found) if found else None))
    return found


def examine(
    objective: Objective, teaching: TeacherEnsemble | None, rows: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """One step on two rows, before any epoch: every loss is finite, and all that is learned gets a gradient.

    Raises:
        HfcompressError: for a loss that is not finite, or a projection that nothing trains.
    """
    device = process_state().device
    collator = Collator(objective.task, tokenizer, teaching, device.type == "cuda")
    batch = {name: value.to(device) for name, value in collator(list(islice(rows, 2))).items()}
    objective.to(device).train()
    teaching = None if teaching is None else teaching.to(device)
    outputs = objective(progress=0.5, **taught(objective, teaching, batch))  # a weight may start or end at 0
    outputs["loss"].backward()
    broken = [name for name, part in outputs["parts"].items() if not bool(part.isfinite())]
    dead = [name for name, p in objective.learned.named_parameters() if p.grad is None or not bool(p.grad.any())]
    objective.zero_grad(set_to_none=True)
    if broken:
        raise HfcompressError(
            f"the loss {broken[0]} is not finite on the first rows", "look for nan in the weights of student or teacher"
        )
    if dead:
        loss = dead[0].partition(".")[0]
        raise HfcompressError(
            f"the projection of {loss} gets no gradient: nothing would train it",
            "give the loss a weight above 0 and a layer map that names the layer, or `projection: shared`",
        )


def score(model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task) -> float:
    """A model's metric on encoded rows; its mode stays as it was."""
    return float(task.score(*judged(model, rows, tokenizer, task)[:2]))


def judged(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[NDArray[Any], NDArray[Any], datasets.Dataset]:
    """A model's predictions for encoded rows, the references, and the rows in that order."""
    outputs, order = answers(model, rows, tokenizer, task)
    features = rows.select(order)
    return *task.judge(outputs, features), features


def answers(
    model: PreTrainedModel, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, task: Task
) -> tuple[NDArray[Any], list[int]]:
    """What `worker.reduced` makes of a model's logits for encoded rows, and the rows' order; its mode stays."""
    import numpy as np

    device = process_state().device
    if model.device.type != device.type:  # an 8-bit model cannot be moved, not even to where it is
        model.to(device)
    training, model = model.training, model.eval()
    outputs, order = [], []
    with torch.inference_mode():
        for group in _like_lengths(rows, 64):
            batch = task.batch(rows.__getitems__(group), tokenizer)
            inputs = {name: value.to(model.device) for name, value in batch.items() if name not in ("labels", "index")}
            logits = observe(model, inputs).logits.float().cpu().numpy()
            outputs.append(reduced(logits, {name: value.numpy() for name, value in batch.items()}, task.head))
            order += group
    model.train(training)
    return np.concatenate(outputs), order


def unused_parameters(objective: Objective) -> bool:
    """Whether some parameters get no gradient: the head, where no loss looks at the logits."""
    return not any(loss.needs_logits for loss in objective.losses.values())


def training_arguments(
    options: Train, folder: Path, seed: int, rows: int | None, metric_name: str, find_unused: bool = False
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
        gradient_accumulation_steps=options.gradient_accumulation,
        warmup_steps=round(options.warmup * steps),
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused",
        **_precision(options.precision),
        remove_unused_columns=False,
        save_strategy=strategy,
        save_steps=options.checkpoint_steps or 500,
        save_total_limit=None,  # `_save_checkpoint` removes the older ones, once the new one is whole
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
        ddp_broadcast_buffers=False,  # all processes make the same masks
        disable_tqdm=False,
        report_to=options.report_to or "none",
        seed=seed,
    )


def _precision(wanted: str) -> dict[str, bool]:
    if wanted == "auto":
        wanted = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return {"bf16": wanted == "bfloat16", "fp16": wanted == "float16"}
