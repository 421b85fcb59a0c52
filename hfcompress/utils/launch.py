"""Makes `accelerate launch --cpu --num_processes N` mean N processes.

accelerate starts CPU processes through MPI only; without a hostfile it starts one, tells it where the others would meet
(`MASTER_ADDR`) and not how many there are. torchrun starts them without MPI, so the command is handed over to it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from hfcompress.utils.errors import HfcompressError

JOINED = frozenset({"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"})
"""What torchrun and the MPI launchers tell a process of the others."""

LEFT_ALONE = (
    "several processes were asked for and `accelerate launch --cpu` started one: without MPI it starts no more",
    "start them with `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/distill.py RECIPE`",
)
"""What to say where others were announced and cannot be started: the mistake, and its repair."""


def hand_over_to_torchrun() -> None:
    """Replaces this process by torchrun where accelerate was asked for several CPU processes and started one.

    Raises:
        HfcompressError: where it cannot be told how many were asked for.
    """
    if not left_alone(os.environ):
        return
    import psutil

    parent = psutil.Process().parent()
    count = asked_processes(parent.cmdline() if parent is not None else [])
    if count is None:
        raise HfcompressError(*LEFT_ALONE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    where = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ.get("MASTER_PORT", "29500")]
    os.execv(sys.executable, [*command, *where, *sys.orig_argv[1:]])


def left_alone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate announced other processes that nobody starts."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return on_cpu and "MASTER_ADDR" in environment and not JOINED & environment.keys()


def lost_process(error: BaseException) -> bool:
    """Whether a distributed run's process failed because another one is gone."""
    if not JOINED & os.environ.keys():
        return False
    told = "connection closed by peer|connection reset by peer|broken pipe|socket closed|timed? ?out"
    return isinstance(error, RuntimeError) and re.search(told, str(error), re.IGNORECASE) is not None


def asked_processes(command: Sequence[str]) -> int | None:
    """The `--num_processes` of an `accelerate launch` command on one machine; None where it does not say."""
    options: dict[str, str] = {}
    for index, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            following = command[index + 1] if index + 1 < len(command) else ""
            options.setdefault(name.lstrip("-").replace("-", "_"), value if equals else following)
    count = options.get("num_processes", "")
    machines = options.get("num_machines", "1")
    return int(count) if count.isdecimal() and machines == "1" else None
