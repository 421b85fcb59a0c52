"""Helpers for distributed runs: the first process works, the others wait or get its values."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.launch import JOINED, LACKS_PROCESSES, lacks_processes

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor

AllReduce = Callable[[Sequence["Tensor"]], None]
"""Sums tensors over all processes, in place; each process calls it with tensors of the same shapes."""


def process_state() -> PartialState:
    """Returns the state of this process in a distributed run.

    accelerate joins CPU processes only if it is told to use a CPU, and its first call decides.

    Raises:
        HfcompressError: if several processes were asked for and only one was started.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from torch import cuda

    wanted = parse_flag_from_env("ACCELERATE_USE_CPU")
    if lacks_processes(os.environ):
        raise HfcompressError(*LACKS_PROCESSES)
    return PartialState(cpu=wanted or (bool(JOINED & os.environ.keys()) and not cuda.is_available()))


def broadcast(value: Any) -> Any:
    """Sends the first process's value to all processes of a distributed run, and returns it."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    if process_state().num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over all processes, in place; every process calls it with tensors of the same shapes."""
    if process_state().num_processes > 1:
        from accelerate.utils import reduce

        for tensor in tensors:
            tensor.copy_(reduce(tensor, "sum"))


def on_main_process(action: Callable[[], None]) -> None:
    """Runs `action` on the first process of a distributed run while the others wait; if it fails, all fail."""
    from accelerate.utils import broadcast_object_list

    state = process_state()
    failure: list[str | None] = [None]
    error: BaseException | None = None
    if state.is_main_process:
        try:
            action()
        except BaseException as caught:
            error, failure = caught, [f"{type(caught).__name__}: {caught}"]
    if state.num_processes > 1:
        broadcast_object_list(failure)
    if error is not None:
        raise error
    if failure[0] is not None:
        raise HfcompressError(f"the first process failed: {failure[0]}")
