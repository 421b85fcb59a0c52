"""The share of a training step at batch 32 that is not the model: drawing, padding, hooks, bookkeeping.

The whole of `Trainer.train` is timed, and inside it the objective's forward, the teacher's forward, the backward pass,
the clipping of the gradients and the optimizer. The ratio is the share of the time that is none of these. `--quick`
takes fewer steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from distill_throughput import SIZES, Ours, bert, padding_tokenizer, rows

from hfcompress.distillation.teachers import Member
from hfcompress.models.shape import shape_of

BATCH, LENGTH, TARGET = 32, 64, 0.05


class Stopwatch:
    """Adds up the time inside some functions; nested calls count once."""

    def __init__(self) -> None:
        self.total, self.depth = 0.0, 0

    def around(self, owner: Any, name: str) -> None:
        """Starts to time a method of an object."""
        inner: Callable[..., Any] = getattr(owner, name)

        @wraps(inner)  # the Trainer reads the names of the inputs from a model's forward
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.total += time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    """Prints both parts and their ratio."""
    steps = 20 if "--quick" in sys.argv else 100
    torch.manual_seed(0)
    teacher, tokenizer = bert(*SIZES["quick"][0]).eval(), padding_tokenizer()
    side = Ours(
        bert(*SIZES["quick"][1]),
        Member("teacher", teacher, tokenizer),
        shape_of(teacher.config.to_dict()),
        ["embeddings", "hidden_states", "attention_scores", "soft_labels"],
        rows(BATCH * (steps + 5), LENGTH),
        LENGTH,
        BATCH,
    )
    for _ in range(5):
        side.step()
    watch, trainer = Stopwatch(), side.trainer
    for owner, name in (
        (side.objective, "forward"),
        (teacher, "forward"),
        (trainer.accelerator, "backward"),
        (trainer.accelerator, "clip_grad_norm_"),
        (side.optimizer, "step"),
        (side.optimizer, "zero_grad"),
    ):
        watch.around(owner, name)
    trainer.args.max_steps, trainer.args.save_strategy = steps, "no"
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    print(f"{torch.get_num_threads()} threads, batch {BATCH}, teacher {SIZES['quick'][0]}, student {SIZES['quick'][1]}")
    print(f"a step:                        {whole / steps * 1000:8.2f} ms")
    print(f"forward, backward, optimizer:  {watch.total / steps * 1000:8.2f} ms")
    print(f"ratio: {1 - watch.total / whole:.3f} (target {TARGET})")


if __name__ == "__main__":
    main()
