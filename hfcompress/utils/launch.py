"""Makes `accelerate launch --cpu --num_processes N` mean N processes.

accelerate starts CPU processes through MPI only. Without a hostfile it starts one, and tells it the address to meet the
others (`MASTER_ADDR`) but not their number. torchrun starts them without MPI, so it gets the command.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence

from hfcompress.utils.errors import HfcompressError

JOINED = frozenset({"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"})
"""Variables by which torchrun and the MPI launchers tell a process the number of processes."""

LACKS_PROCESSES = (
    "several processes were asked for and `accelerate launch --cpu` started one: without MPI it starts no more",
    "start them with `ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 scripts/distill.py RECIPE`",
)
"""The error for processes that were announced and not started, and how to fix it."""


def hand_over_to_torchrun() -> None:
    """Replaces this process by torchrun if accelerate was asked for several CPU processes and started one.

    Raises:
        HfcompressError: if the number of processes is unknown.
    """
    if not lacks_processes(os.environ):
        return
    import psutil

    parent = psutil.Process().parent()
    count = parse_num_processes(parent.cmdline() if parent is not None else [])
    if count is None:
        raise HfcompressError(*LACKS_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    where = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ.get("MASTER_PORT", "29500")]
    os.execv(sys.executable, [*command, *where, *sys.orig_argv[1:]])


def lacks_processes(environment: Mapping[str, str]) -> bool:
    """True if accelerate announced other processes that nobody starts."""
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return on_cpu and "MASTER_ADDR" in environment and not JOINED & environment.keys()


def is_lost_process(error: BaseException) -> bool:
    """True if a process of a distributed run failed because another one ended."""
    if not JOINED & os.environ.keys():
        return False
    told = "connection closed by peer|connection reset by peer|broken pipe|socket closed|timed? ?out"
    return isinstance(error, RuntimeError) and re.search(told, str(error), re.IGNORECASE) is not None


def parse_num_processes(command: Sequence[str]) -> int | None:
    """Finds the `--num_processes` of an `accelerate launch` command on one machine; None if there is none."""
    options: dict[str, str] = {}
    for index, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            following = command[index + 1] if index + 1 < len(command) else ""
            options.setdefault(name.lstrip("-").replace("-", "_"), value if equals else following)
    count = options.get("num_processes", "")
    machines = options.get("num_machines", "1")
    return int(count) if count.isdecimal() and machines == "1" else None
