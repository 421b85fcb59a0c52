"""Proof that what was saved is what was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfcompress.measure.process import ModelProcess, code_for
from hfcompress.model.artifact import Artifact
from hfcompress.model.probe import probe_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = {"float32": 1e-5, "int8": 1e-5, "nf4": 1e-5, "fp4": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, relative to the largest logit or 1: kernels differ by rounding, nothing more."""


class ReloadError(RuntimeError):
    """A saved model that is not the one in memory."""


def verify(artifact: Artifact, expected: NDArray[Any], auto_class: str, device: str = "cpu") -> float:
    """Loads a saved model in a fresh process and holds its logits against those of the model in memory.

    Args:
        artifact: The saved model.
        expected: Logits of the one in memory, on the artifact's probe.
        auto_class: Such as `AutoModelForSequenceClassification`.
        device: Where the one in memory ran.

    Returns:
        The largest difference.

    Raises:
        ReloadError: where it is beyond what rounding explains.
    """
    import numpy as np

    if artifact.runtime == "torch" and code_for(artifact)["register"] is not None:
        raise ReloadError(f"{artifact.path} needs its modeling file beside it, and that is missing or altered")
    with ModelProcess(artifact, auto_class, device) as process:
        found = process.logits([probe_inputs(artifact.path)])
    if found.shape != expected.shape:
        raise ReloadError(f"{artifact.path}, reloaded, answers {found.shape} where {expected.shape} were expected")
    difference = float(np.abs(found - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not difference <= TOLERANCE.get(artifact.dtype, 1e-5):
        raise ReloadError(
            f"{artifact.path}, reloaded in a fresh process, differs from the model in memory by {difference:.2g}"
        )
    return difference
