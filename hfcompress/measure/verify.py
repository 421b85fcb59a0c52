"""Proves that a saved model equals the model in memory, for each way to load it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.measure.plain_texts import Reading, ReloadError, compare_plain_texts
from hfcompress.measure.process import OWN_CODE, ModelProcess, choose_code
from hfcompress.models.artifact import Artifact, load_model
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.onnx.export import export, quiet
from hfcompress.onnx.graph_io import EXPORT_TOLERANCE
from hfcompress.utils.errors import disk_problem
from hfcompress.utils.files import require_space, scratch_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = {"float32": 1e-5, "int8": 1e-5, "int4": 1e-5, "nf4": 1e-5, "fp4": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, relative to the largest logit or 1: kernels may differ by rounding only."""


def verify(
    artifact: Artifact, expected: NDArray[Any], auto_class: str, device: str = "cpu", reading: Reading | None = None
) -> dict[str, float]:
    """Loads a saved model in a fresh process and compares its logits with those of the model in memory.

    Args:
        artifact: The saved model.
        expected: Logits of the model in memory, for the artifact's dummy inputs.
        auto_class: Such as `AutoModelForSequenceClassification`.
        device: The device of the model in memory.
        reading: How the model in memory read its texts; the saved one must read and answer some of them alike.

    Returns:
        The largest difference, by the way of loading: `transformers` (a pruned model with the modeling file beside it);
        `hfcompress`, without a flag after `import hfcompress` (a pruned model, or int8 layers); `openvino`; `onnx` (an
        ONNX model; also the model of a `prune` stage, exported with another batch size and length, if onnxruntime is
        installed); and the differences of `compare_plain_texts`.

    Raises:
        ReloadError: if a difference is larger than rounding explains.
    """
    if artifact.is_pruned and not artifact.needs_import and choose_code(artifact)["register"] is not None:
        raise ReloadError(f"{artifact.path} needs its modeling file beside it, and that is missing or altered")
    probe, tolerance = make_dummy_inputs(artifact.path), TOLERANCE.get(artifact.dtype, 1e-5)
    with ModelProcess(artifact, auto_class, device, as_stored=True) as process:

        def difference(way: str, tolerance: float) -> float:
            return _difference(f"{artifact.path}, reloaded by {way}", process.logits([probe]), expected, tolerance)

        way = "hfcompress" if artifact.needs_import else "transformers"
        way = way if artifact.runtime == "torch" else artifact.runtime
        found = {way: difference(way, tolerance)}
        if reading is not None:
            found |= compare_plain_texts(process, reading)
        if way != "transformers":
            return found
        if artifact.is_pruned:
            process.load(artifact, **OWN_CODE)
            found["hfcompress"] = difference("hfcompress", tolerance)
            with _export_graph(artifact, auto_class) as graph:
                if graph:
                    process.load(graph, **choose_code(graph))
                    found["onnx"] = difference("onnxruntime", EXPORT_TOLERANCE)
    return found


def _difference(what: str, found: NDArray[Any], expected: NDArray[Any], tolerance: float) -> float:
    import numpy as np

    if found.shape != expected.shape:
        raise ReloadError(f"{what}, answers {found.shape} where {expected.shape} were expected")
    difference = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not difference <= tolerance:
        raise ReloadError(f"{what} in a fresh process, differs from the model in memory by {difference:.2g}")
    return difference


@contextmanager
def _export_graph(artifact: Artifact, auto_class: str) -> Iterator[Artifact | None]:
    """Exports the model of a prune stage to a graph in a scratch directory; None if it cannot be exported."""
    if artifact.kind != "prune" or not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        yield None
        return
    with scratch_directory() as folder:
        graph: Artifact | None = replace(artifact, path=folder, runtime="onnx")
        try:
            shutil.copyfile(artifact.path / "config.json", folder / "config.json")
            with quiet():
                export(
                    load_model(artifact.path, auto_class),
                    folder / "model.onnx",
                    make_dummy_inputs(artifact.path, rows=2, length=9),
                )
        except Exception as error:  # an operator that the exporter does not know raises an error of any type
            if disk_problem(error):
                raise
            require_space(folder, error)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.info(f"{artifact.path} cannot be exported to ONNX: {reason}")
            graph = None
        yield graph
