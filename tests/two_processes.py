"""What tests of several processes share: a script of a run's stages, and what starts it twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

RUN_STAGES = """
import json, logging, os, sys
from pathlib import Path
from hfcompress.utils.logging import log
from hfcompress.models.artifact import open_artifact
from hfcompress.recipe.loader import load
from hfcompress.context import StageContext
from hfcompress.utils.distributed import process_state

recipe_file, target = Path(sys.argv[1]), Path(sys.argv[2])
recipe = load(recipe_file).recipe
source = parent = open_artifact(Path(recipe.model))
logging.basicConfig(level="INFO")
log.info("said once")
for name, stage in zip(recipe.stage_names(), recipe.stages):
    context = StageContext(recipe.task, recipe.seed, source, {}, target / name)
    context.directory.mkdir(parents=True, exist_ok=True)  # as a run does
    result = stage.run(parent, context)
    parent = open_artifact(result.directory, name)
    (target / name / f"facts-{os.environ['RANK']}.json").write_text(json.dumps(dict(result.facts)))
if os.environ["RANK"] == "1":
    (target / "second.txt").write_text(repr(result.logits))
"""
END = """
process_state().wait_for_everyone()
process_state().destroy_process_group()  # a process that leaves first can abort the other's communication threads
"""
CPU = {"ACCELERATE_USE_CPU": "1"}
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]  # fmt: skip


def find_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(launcher: list[str], folder: Path, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, find_free_port(), str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env=os.environ | CPU)


def run_two_processes(script: Path, home: Path, *arguments: object) -> list[str]:
    """Starts what a launcher would start, without its own seconds of imports; what each wrote to both streams."""
    shared = os.environ | CPU | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": find_free_port(), "WORLD_SIZE": "2"}
    command = [sys.executable, str(script), *map(str, arguments)]
    running = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=shared | {"RANK": rank, "LOCAL_RANK": rank, "HFCOMPRESS_HOME": str(home)},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs
    return outputs
