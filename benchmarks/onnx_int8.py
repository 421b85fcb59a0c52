"""PyTorch eager float32 against the exported graph in float32, dynamic int8 and static int8, each in its process.

All take turns on the same batches: one row of 16 tokens and of 64, 32 full rows of 32, and 256 rows of lengths like
SST-2's, sorted and cut into batches of 32. MiniLM-L6-H384's shape with random weights, or `--model DIR`; `--quick`
takes fewer rounds, `--threads N` sets the number of threads.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import BertConfig, BertForSequenceClassification

from hfcompress.measure.environment import cpu_name
from hfcompress.measure.process import Batch, ModelProcess
from hfcompress.measure.timing import fastest_threads
from hfcompress.models.artifact import open_artifact, read_config
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.export import load_and_export
from hfcompress.onnx.graph_io import write_model_directory
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.utils.processors import default_threads

AUTO = "AutoModelForSequenceClassification"
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TARGETS = {"1 x 16": 3.0, "1 x 64": 2.0, "32 x 32": 1.8, "32 rows, lengths like SST-2's": 1.8}
JUDGED = "1 x 16"
DRAW = np.random.default_rng(0)


def rows(lengths: Any, vocabulary: int) -> Batch:
    """Makes random tokens, padded to the longest row."""
    mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    ids = DRAW.integers(min(1000, vocabulary // 2), vocabulary, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def batches(vocabulary: int) -> dict[str, list[Batch]]:
    """Makes the batches of each setting."""
    lengths = np.sort(np.clip(DRAW.lognormal(3.1, 0.5, 256), 4, 64).astype(int))
    return {
        "1 x 16": [rows([16], vocabulary)],
        "1 x 64": [rows([64], vocabulary)],
        "32 x 32": [rows([32] * 32, vocabulary)],
        "32 rows, lengths like SST-2's": [rows(some, vocabulary) for some in lengths.reshape(-1, 32)],
    }


def make_variants(source: Path, folder: Path) -> dict[str, Path]:
    """Writes a directory for each variant, PyTorch's first."""
    probe, vocabulary = make_dummy_inputs(source), read_config(source)["vocab_size"]
    model, graph = load_and_export(source, AUTO, probe)
    found = {"torch": source, "onnx float32": folder / "float32"}
    found["onnx float32"].mkdir()
    write_model_directory(graph, model.config, found["onnx float32"], probe, "float32")

    def calibration(_count: int) -> list[Batch]:
        return [rows(DRAW.integers(8, 33, 16), vocabulary) for _ in range(4)]

    for mode in ("dynamic", "static"):
        target = found[f"onnx_int8 {mode}"] = folder / mode
        target.mkdir()
        backend = BACKENDS.parse({"use": "onnx_int8", "mode": mode})
        backend.quantize(QuantizationJob(source, target, AUTO, probe, calibration))
    return found


def time_variants(processes: Mapping[str, ModelProcess], given: list[Batch], rounds: int) -> dict[str, float]:
    """Times all batches in each process, PyTorch at its fastest thread count; returns the median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    for process in processes.values():
        process.prepare(given)
    threads = {name: fastest_threads(process) for name, process in processes.items()}
    for number in range(rounds):
        for name, process in list(processes.items())[:: 1 if number % 2 else -1]:
            seconds[name].append(sum(process.time(threads[name]).seconds))
    return {name: median(values) for name, values in seconds.items()}


def main() -> None:
    """Prints each variant's time and its speed-up over PyTorch; the last line is for dynamic int8."""
    warnings.simplefilter("ignore")
    arguments = sys.argv[1:]
    threads = int(arguments[arguments.index("--threads") + 1]) if "--threads" in arguments else default_threads()
    with TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        if "--model" in arguments:
            source = Path(arguments[arguments.index("--model") + 1])
        else:
            source = folder / "source"
            BertForSequenceClassification(BertConfig(**SHAPE)).save_pretrained(source)
        variants = make_variants(source, folder)
        processes = {
            name: stack.enter_context(ModelProcess(open_artifact(path), AUTO, threads=threads))
            for name, path in variants.items()
        }
        print(f"{cpu_name()}, up to {threads} threads")
        ratios = {}
        for setting, given in batches(read_config(source)["vocab_size"]).items():
            tokens = sum(batch["input_ids"].size for batch in given)
            seconds = time_variants(
                processes, given, max(5, (3000 if "--quick" in arguments else 20_000) // (100 + tokens))
            )
            ratios[setting] = {name: seconds["torch"] / value for name, value in seconds.items()}
            found = ", ".join(f"{name} {seconds[name] * 1e3:.2f} ms {ratios[setting][name]:.2f}x" for name in seconds)
            print(f"{setting}: {found} (target of int8 {TARGETS[setting]:g})")
    print(f"ratio: {ratios[JUDGED]['onnx_int8 dynamic']:.2f} (target {TARGETS[JUDGED]:g})")


if __name__ == "__main__":
    main()
