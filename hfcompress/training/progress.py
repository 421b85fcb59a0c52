"""Shows the course of a training: on a terminal as one bar, elsewhere as a line at each logging step."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback

from hfcompress.utils.logging import log

FORMAT = "{percentage:3.0f}%|{bar:12}| step {n_fmt} of {total_fmt}, {remaining} left{postfix}"


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows steps, time left, loss and dev metric; transformers' own callbacks print dictionaries."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.figures: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm.auto import tqdm

            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=FORMAT, mininterval=0.5
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        found = {_name(key): f"{value:.4g}" for key, value in (logs or {}).items() if _name(key)}
        if not found or not state.is_world_process_zero:
            return
        if self.bar is not None:
            # The parts of a loss do not fit into a line; trackers get them, and a file or a pipe has them.
            self.figures |= {name: value for name, value in found.items() if not name.startswith("loss_")}
            self.bar.set_postfix_str(
                ", ".join(f"{name} {value}" for name, value in self.figures.items()), refresh=False
            )
        else:
            told = ", ".join(f"{name} {value}" for name, value in found.items())
            log.info(f"step {state.global_step:,} of {state.max_steps:,}: {told}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _name(key: str) -> str:
    """The name of a logged figure that is shown: a loss, or the metric on the dev split; empty for any other."""
    if key.startswith("eval_"):
        return f"dev {key.removeprefix('eval_')}" if not key.endswith(("_runtime", "_per_second")) else ""
    hidden = ("train_", "grad_norm", "learning_rate", "epoch", "total_flos")
    return "" if key.startswith(hidden) else key
