"""OpenVINO without quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel


class Openvino(Backend):
    """Exports the float model to OpenVINO, which computes in bfloat16 on a CPU that has it, else in float32."""

    source: ClassVar[str] = (
        "https://docs.openvino.ai/2024/openvino-workflow/running-inference/optimize-inference/precision-control.html"
    )
    extra: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "openvino")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)

    weights: Literal["float32", "float16"] = "float32"
    """The type that weights are stored in. float16 halves the file; OpenVINO converts it when it loads the model."""

    def plan(self, shape: Shape) -> Shape:
        bits = 32 if self.weights == "float32" else 16
        return replace(shape, linear_bits=bits, head_bits=bits, embedding_bits=bits, other_bits=bits)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.quantization.backends.onnx_fp16 import require_float16_range
        from hfcompress.quantization.graphs.openvino import load_and_convert, write_openvino_directory

        model, _, converted = load_and_convert(job)
        half = self.weights == "float16"
        if half:
            require_float16_range(model)
        return QuantizedModel(write_openvino_directory(converted, model.config, job, half))
