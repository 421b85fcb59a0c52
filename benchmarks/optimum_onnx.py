"""onnx_int8 against `optimum-cli onnxruntime quantize` of the same model, each in its process, in turns.

It needs Optimum's ONNX part: `make test-optimum` builds `.venv-optimum`. The peer uses its configuration for this
processor, by default (one scale a matrix) and with `--per_channel`; a second peer runs `optimum-cli onnxruntime
optimize` at -O2 and -O3 before, if onnxruntime can quantize the result. MiniLM-L6-H384's shape with random
weights, or `--model DIR`; `--quick` takes fewer rounds, `--threads N` sets the number of threads. The ratio is the
peer's time divided by ours, the worst of all.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from hfcompress.measure.environment import cpu_name
from hfcompress.measure.process import ModelProcess
from hfcompress.models.artifact import open_artifact
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.backends.optimum_onnx import OptimumOnnx, detect_instructions
from hfcompress.utils.processors import default_threads

AUTO = "AutoModelForSequenceClassification"
SETTINGS = ((1, 16), (1, 64), (32, 32))
TARGET = 0.95


class PeerError(RuntimeError):
    """`optimum-cli` failed."""


def optimum(*arguments: object) -> None:
    """Runs `optimum-cli`.

    Raises:
        PeerError: with the last line that it wrote.
    """
    command = [str(Path(sys.executable).with_name("optimum-cli")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise PeerError(done.stderr.strip().splitlines()[-1])


def make_variants(source: Path, folder: Path) -> dict[str, Path]:
    """Writes a directory for each variant: ours first, then the peer's."""
    ours, exported = folder / "onnx_int8", folder / "float"
    ours.mkdir()
    BACKENDS.parse("onnx_int8").quantize(QuantizationJob(source, ours, AUTO, make_dummy_inputs(source)))
    optimum("export", "onnx", "--model", source, "--task", "text-classification", exported)
    found = {"onnx_int8": ours, **quantize_with_peer(exported, "")}
    for level in ("-O2", "-O3"):
        first = f"optimize {level}, "
        try:
            optimum("onnxruntime", "optimize", "--onnx_model", exported, level, "-o", folder / level)
            found |= quantize_with_peer(folder / level, first)
        except PeerError as error:
            print(f"{first}quantize fails: {str(error).partition('. ')[0]}")
    return found


def quantize_with_peer(graph: Path, first: str) -> dict[str, Path]:
    """Quantizes a float graph with the peer, with one scale a matrix and with one a channel."""
    found = {}
    for option in ("", "--per_channel"):
        target = graph.with_name(f"{graph.name}{option}-int8")
        kind = f"--{detect_instructions()}"
        optimum("onnxruntime", "quantize", "--onnx_model", graph, kind, *option.split(), "-o", target)
        found[f"{first}quantize {option}".strip()] = target
    return found


def time_variants(processes: Mapping[str, ModelProcess], batch: Any, rounds: int) -> dict[str, float]:
    """Times one batch in each process, in turns; returns the median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for process in processes.values():
        process.prepare([batch] * 4)
    for _ in range(rounds):
        for name, process in processes.items():
            seconds[name] += process.time().seconds
    return {name: median(values) for name, values in seconds.items()}


def build_model(folder: Path) -> Path:
    """Builds a model of MiniLM-L6-H384's shape with random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder)
    return folder


def main() -> None:
    """Prints the milliseconds of each variant in each setting, and the ratio of the peer's to ours."""
    import numpy as np

    why = OptimumOnnx().unavailable()
    if why:
        raise SystemExit(f"{why[0]}: run `make test-optimum` once, then .venv-optimum/bin/python {sys.argv[0]}")
    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    threads = int(options["--threads"]) if "--threads" in options else default_threads()
    rounds = 10 if "--quick" in sys.argv else 60
    worst: dict[bool, float] = {}
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        source = Path(options["--model"]) if "--model" in options else build_model(folder / "source")
        variants = make_variants(source, folder)
        print(f"{cpu_name()}, {threads} threads, {source.name}; optimum-cli quantize --{detect_instructions()}")
        processes = {
            name: stack.enter_context(ModelProcess(open_artifact(path), AUTO, threads=threads))
            for name, path in variants.items()
        }
        for rows, length in SETTINGS:
            ids = np.random.default_rng(0).integers(1000, 2000, (rows, length))
            batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            found = time_variants(processes, batch, rounds)
            for name, seconds in found.items():
                ratio = seconds / found["onnx_int8"]
                print(f"{rows:>2}x{length}  {seconds * 1e3:8.2f} ms  {ratio:5.2f}  {name}")
                if name != "onnx_int8":
                    first = name.startswith("optimize")
                    worst[first] = min(worst.get(first, ratio), ratio)
    if True in worst:
        print(f"optimized first: {worst[True]:.2f}")
    print(f"ratio: {worst[False]:.2f} (target {TARGET})")


if __name__ == "__main__":
    main()
