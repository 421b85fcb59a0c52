"""Proof that what was saved is what was made, by each way that it can be loaded."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfcompress.measure.plain_texts import Reading, ReloadError, read_alike
from hfcompress.measure.process import OWN_CODE, ModelProcess, code_for
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
"""Largest difference of a logit, relative to the largest logit or 1: kernels differ by rounding, nothing more."""


def verify(
    artifact: Artifact, expected: NDArray[Any], auto_class: str, device: str = "cpu", reading: Reading | None = None
) -> dict[str, float]:
    """Loads a saved model in a fresh process and holds its answers against those of the model in memory.

    Args:
        artifact: The saved model.
        expected: Logits of the one in memory, on the artifact's probe.
        auto_class: Such as `AutoModelForSequenceClassification`.
        device: Where the one in memory ran.
        reading: How the one in memory read its texts; the saved one has to read and answer some of them alike.

    Returns:
        The largest difference, by each way to load it: with `transformers` (of a pruned model, the modeling file
        beside it), with no flag after `import hfcompress` (of a pruned model, and of int8 layers), as `openvino`, and
        as `onnx` (what is ONNX, and a model that a `prune` stage made, exported with other batch and length, where
        onnxruntime is installed); and what `read_alike` finds.

    Raises:
        ReloadError: where one is beyond what rounding explains.
    """
    if artifact.is_pruned and not artifact.needs_import and code_for(artifact)["register"] is not None:
        raise ReloadError(f"{artifact.path} needs its modeling file beside it, and that is missing or altered")
    probe, tolerance = make_dummy_inputs(artifact.path), TOLERANCE.get(artifact.dtype, 1e-5)
    with ModelProcess(artifact, auto_class, device, as_stored=True) as process:

        def difference(way: str, tolerance: float) -> float:
            return _difference(f"{artifact.path}, reloaded by {way}", process.logits([probe]), expected, tolerance)

        way = "hfcompress" if artifact.needs_import else "transformers"
        way = way if artifact.runtime == "torch" else artifact.runtime
        found = {way: difference(way, tolerance)}
        if reading is not None:
            found |= read_alike(process, reading)
        if way != "transformers":
            return found
        if artifact.is_pruned:
            process.load(artifact, **OWN_CODE)
            found["hfcompress"] = difference("hfcompress", tolerance)
            with _exported(artifact, auto_class) as graph:
                if graph:
                    process.load(graph, **code_for(graph))
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
def _exported(artifact: Artifact, auto_class: str) -> Iterator[Artifact | None]:
    """The model of a prune stage as a graph in a scratch directory; None where it cannot be made."""
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
        except Exception as error:  # the exporter raises whatever the operator that it does not know does
            if disk_problem(error):
                raise
            require_space(folder, error)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.info(f"{artifact.path} cannot be exported to ONNX: {reason}")
            graph = None
        yield graph
