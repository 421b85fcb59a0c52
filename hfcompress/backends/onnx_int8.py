"""ONNX Runtime dynamic int8."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.backends.base import Backend, Work
from hfcompress.base.errors import HfcompressError
from hfcompress.base.shape import PRUNED, Shape
from hfcompress.graphs.export import export, quiet, run_onnx
from hfcompress.model.probe import logits_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXPORT_TOLERANCE = 1e-4


class OnnxInt8(Backend):
    """Exported to ONNX, int8 weights per channel and activations quantized as they come; embeddings included."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)

    per_channel: bool = True
    """One scale an output channel instead of one a matrix."""
    embeddings: bool = True
    """Quantize the embedding tables too: in a small encoder they are most of the file."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, embedding_bits=8 if self.embeddings else 32)

    def quantize(self, work: Work) -> NDArray[Any]:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        from hfcompress.model.artifact import load_model

        model = load_model(work.source, work.auto_class)
        with TemporaryDirectory(prefix="hfcompress-onnx-") as folder, quiet():
            exported = Path(folder) / "model.onnx"
            export(model, exported, work.probe)
            _require_equal(run_onnx(exported, work.probe), logits_of(model, work.probe))
            quantize_dynamic(
                exported,
                work.target / "model.onnx",
                weight_type=QuantType.QInt8,
                per_channel=self.per_channel,
                op_types_to_quantize=["MatMul", "Gemm", *(["Gather"] if self.embeddings else [])],
                extra_options={"MatMulConstBOnly": True},
            )
        _write_config(model.config, work.target)
        return run_onnx(work.target / "model.onnx", work.probe)


def _require_equal(exported: NDArray[Any], expected: NDArray[Any]) -> None:
    import numpy as np

    difference = float(np.abs(exported - expected).max())
    if not difference <= EXPORT_TOLERANCE:
        raise HfcompressError(f"the exported graph differs from the model by {difference:.2g} before any quantization")


def _write_config(config: Any, path: Path) -> None:
    """The model's config.json, with the label names that transformers leaves out, and of the stock architecture.

    The graph needs no modeling code, whatever its shape, so nothing that reads the config should look for any.
    """
    config.save_pretrained(path)
    content = json.loads((path / "config.json").read_text(encoding="utf-8"))
    content.pop("auto_map", None)
    content |= {"id2label": config.id2label, "model_type": str(config.model_type).removeprefix(PRUNED)}
    (path / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
