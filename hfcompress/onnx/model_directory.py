"""From a model directory to a checked graph, and from a graph to a model directory: what all ONNX backends share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import PRUNED
from hfcompress.models.artifact import load_model
from hfcompress.models.dummy_inputs import Probe, logits_of
from hfcompress.onnx.export import export, quiet, run_onnx
from hfcompress.onnx.graph_files import save_graph
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

EXPORT_TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit or 1."""


def exported(source: Path, auto_class: str, probe: Probe) -> tuple[PreTrainedModel, onnx.ModelProto]:
    """The float model of a directory, and a graph that gives the same logits on the probe.

    Raises:
        HfcompressError: where the graph's logits differ from the model's, or weights are not finite.
    """
    import onnx

    from hfcompress.models.linears import linears
    from hfcompress.models.odd_weights import require_finite

    model = load_model(source, auto_class)
    require_finite(linears(model))
    with scratch_directory() as folder, quiet():
        path = folder / "model.onnx"
        export(model, path, probe)
        require_same(path, model, probe)
        return model, onnx.load(path)


def require_same(path: Path, model: PreTrainedModel, probe: Probe) -> None:
    """Passes where a float graph gives the model's logits on the probe; a token of padding may be answered anything.

    Raises:
        HfcompressError: where they differ.
    """
    import numpy as np

    expected = logits_of(model, probe)
    differences = np.abs(run_onnx(path, probe) - expected) / max(1.0, float(np.abs(expected).max()))
    difference = float((differences if differences.ndim == 2 else differences[probe["attention_mask"] == 1]).max())
    if not difference <= EXPORT_TOLERANCE:
        raise HfcompressError(f"the exported graph differs from the model by {difference:.2g} before any quantization")


def stored(graph: onnx.ModelProto, config: Any, target: Path, probe: Probe) -> NDArray[Any]:
    """Writes `model.onnx` and the model's config into a directory; see `save_graph` for large graphs.

    Returns:
        The logits on the probe of the graph that was written.
    """
    save_graph(graph, target / "model.onnx")
    write_config(config, target)
    return run_onnx(target / "model.onnx", probe)


def write_config(config: Any, path: Path) -> None:
    """The model's config.json, with the label names that transformers leaves out, and of the stock architecture.

    The graph needs no modeling code, whatever its shape, so nothing that reads the config should look for any.
    """
    config.save_pretrained(path)
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    content.pop("auto_map", None)
    content |= {"id2label": config.id2label, "model_type": str(config.model_type).removeprefix(PRUNED)}
    (path / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
