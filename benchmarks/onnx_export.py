"""The exporter behind the ONNX backends (traced, fused attention) against torch's dynamo exporter, as int8 graphs.

Both sides: the same random BERT of MiniLM-L6's shape, the same quantization, interleaved. `--quick` runs fewer rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import BertConfig, BertForSequenceClassification

from hfcompress.onnx.export import export

SHAPES = ((1, 24), (32, 40))
TARGET = 1.0


def model() -> Any:
    """Builds a model of random weights: only speed is measured."""
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config).eval()


def batch(rows: int, length: int) -> dict[str, Any]:
    """Makes token ids; the last row is half padded."""
    ids = np.random.default_rng(0).integers(1000, 30000, (rows, length))
    mask = np.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def dynamo(source: Any, path: Path, probe: dict[str, Any]) -> None:
    """Exports with torch's exporter and SDPA, as its documentation shows."""
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    inputs = {name: torch.from_numpy(value) for name, value in probe.items()}
    torch.onnx.export(
        source, (), str(path), kwargs=inputs, input_names=list(probe), output_names=["logits"],
        dynamic_shapes=dict.fromkeys(probe, shape), external_data=False, dynamo=True, verbose=False,
    )  # fmt: skip


def session(source: Any, exporter: Callable[..., None], folder: Path) -> onnxruntime.InferenceSession:
    """Exports, quantizes and loads a model; prints the time of the export."""
    start = time.perf_counter()
    exporter(source, folder / "float.onnx", batch(2, 16))
    seconds = time.perf_counter() - start
    kinds = ["MatMul", "Gemm", "Gather"]
    quantize_dynamic(
        folder / "float.onnx",
        folder / "int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=kinds,
        extra_options={"MatMulConstBOnly": True},
    )
    print(f"{exporter.__name__}: exported in {seconds:.1f} s, {(folder / 'int8.onnx').stat().st_size / 1e6:.1f} MB")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(folder / "int8.onnx"), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Prints both sides at each shape, and the ratio for the last shape."""
    warnings.simplefilter("ignore")
    source, rounds = model(), 20 if "--quick" in sys.argv else 100
    with TemporaryDirectory() as one, TemporaryDirectory() as two:
        sides = {"traced": session(source, export, Path(one)), "dynamo": session(source, dynamo, Path(two))}
        ratio = 0.0
        for rows, length in SHAPES:
            feed = batch(rows, length)
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(rounds):
                for name, side in sides.items():
                    start = time.perf_counter()
                    side.run(["logits"], {node.name: feed[node.name] for node in side.get_inputs()})
                    seconds[name].append(time.perf_counter() - start)
            traced, other = (statistics.median(seconds[name]) for name in ("traced", "dynamo"))
            ratio = other / traced
            print(f"{rows} x {length}: traced {traced * 1e3:.2f} ms, dynamo {other * 1e3:.2f} ms, {ratio:.2f}x")
    print(f"ratio: {ratio:.2f} (target {TARGET})")


if __name__ == "__main__":
    main()
