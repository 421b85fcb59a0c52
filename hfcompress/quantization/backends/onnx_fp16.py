"""float16 for ONNX Runtime: half the file; fast on GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import Note, has_only_avx2
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 65504.0
"""The largest float16."""


class OnnxFp16(Backend):
    """Exports to ONNX in half precision: half the file. GPUs compute in it; most CPUs convert it to float32."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/float16.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, "its speed was not measured on a processor with AVX2 alone"),
    )

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        """Converts the graph by ONNX Runtime's own converter, which leaves the logits in float32.

        An attention mask adds the lowest float32 to the scores of padding; it becomes the lowest float16. ONNX Runtime
        has no float16 kernels for x86 processors: it converts to float32 around each operator, and is at best as fast
        as the float32 graph.

        Raises:
            HfcompressError: for weights or logits that are too large for float16.
        """
        import numpy as np
        from onnxruntime.transformers.float16 import convert_float_to_float16

        from hfcompress.onnx.export import load_and_export, quiet
        from hfcompress.onnx.graph_io import is_large, save_graph, write_model_directory
        from hfcompress.quantization.graphs.embeddings import tie_embeddings

        model, graph = load_and_export(job.source, job.auto_class, job.dummy_inputs)
        require_float16_range(model)
        tie_embeddings(graph)
        with quiet(), scratch_directory() as folder:
            given: Any = graph
            if is_large(graph):  # the converter infers the shapes of a large graph only from a file
                given = str(folder / "model.onnx")
                save_graph(graph, Path(given))
            graph = convert_float_to_float16(given, keep_io_types=True)
        logits = write_model_directory(graph, model.config, job.target, job.dummy_inputs, "float16")
        if not np.isfinite(logits).all():
            raise HfcompressError(f"{job.source} computes values beyond float16's {LARGEST:g}", "use onnx_int8")
        return QuantizedModel(logits)


def require_float16_range(model: PreTrainedModel) -> None:
    """Checks that float16 can hold all weights."""
    for name, weight in model.named_parameters():
        beyond = int((~(weight.abs() <= LARGEST)).sum())
        if beyond:
            raise HfcompressError(
                f"{name} has {beyond} values that are not finite or beyond float16's {LARGEST:g}",
                "use bfloat16 or onnx_int8; if a value is not finite, train the model again",
            )
