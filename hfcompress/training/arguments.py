"""Makes `transformers.TrainingArguments` of a `train:` block; no other file does."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from hfcompress.training.options import Train
from hfcompress.utils.distributed import process_state


def make_arguments(
    options: Train,
    folder: Path,
    seed: int,
    rows: int | None,
    metric: str,
    greater_is_better: bool = True,
    find_unused: bool = False,
) -> TrainingArguments:
    """Makes the arguments of a training.

    Args:
        options: The `train:` block.
        folder: The directory of the checkpoints.
        seed: The seed of the training.
        rows: Train rows; None if their number is not known.
        metric: The metric that decides which model is the best.
        greater_is_better: True if the best model has the highest score.
        find_unused: True if some parameters get no gradient; DDP then has to look for them.
    """
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
        **_choose_precision(options.precision),
        remove_unused_columns=False,
        save_strategy=strategy,
        save_steps=options.checkpoint_steps or 500,
        save_total_limit=None,  # `_save_checkpoint` removes the older ones, once the new one is complete
        eval_strategy=strategy if options.keep_best else "no",
        eval_steps=options.checkpoint_steps,
        load_best_model_at_end=options.keep_best and strategy != "no",
        metric_for_best_model=metric,
        greater_is_better=greater_is_better,
        logging_steps=options.logging_steps,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=process_state().device.type == "cpu",
        ddp_find_unused_parameters=find_unused,
        ddp_broadcast_buffers=False,  # all processes make the same masks
        disable_tqdm=True,  # `progress.Progress` shows one bar
        report_to=options.report_to or "none",
        seed=seed,
    )


def _choose_precision(wanted: str) -> dict[str, bool]:
    if wanted == "auto":
        wanted = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    return {"bf16": wanted == "bfloat16", "fp16": wanted == "float16"}
