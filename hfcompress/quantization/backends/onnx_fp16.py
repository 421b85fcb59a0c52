"""ONNX Runtime in half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

LARGEST = 65504.0
"""What float16 ends at."""


class OnnxFp16(Backend):
    """Exported to ONNX, all in half precision: half the file; a GPU computes in it, most CPUs go back to float32."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/float16.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16)

    def quantize(self, work: Work) -> NDArray[Any]:
        """Logits stay float32, and so does what ONNX Runtime's converter keeps so.

        The lowest float32, which an attention mask adds to the scores of padding, becomes the lowest float16. An x86
        processor has no kernels for float16: onnxruntime converts to float32 around each operator, and is as fast as
        with the float32 graph at best.

        Raises:
            HfcompressError: for weights or answers that float16 has no room for.
        """
        import numpy as np
        from onnxruntime.transformers.float16 import convert_float_to_float16

        from hfcompress.onnx.export import quiet
        from hfcompress.onnx.graph_files import is_large, save_graph
        from hfcompress.onnx.model_directory import exported, stored
        from hfcompress.quantization.graphs.embeddings import tie

        model, graph = exported(work.source, work.auto_class, work.probe)
        _require_room(model)
        tie(graph)
        with quiet(), scratch_directory() as folder:
            given: Any = graph
            if is_large(graph):  # the converter infers shapes of a large graph from its file alone
                given = str(folder / "model.onnx")
                save_graph(graph, Path(given))
            graph = convert_float_to_float16(given, keep_io_types=True)
        logits = stored(graph, model.config, work.target, work.probe)
        if not np.isfinite(logits).all():
            raise HfcompressError(f"what {work.source} computes is beyond float16's {LARGEST:g}", "use onnx_int8")
        return logits


def _require_room(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        beyond = int((~(weight.abs() <= LARGEST)).sum())
        if beyond:
            raise HfcompressError(
                f"{name} has {beyond} values that are not finite or beyond float16's {LARGEST:g}",
                "use bfloat16 or onnx_int8; train the model again where a value is not finite",
            )
