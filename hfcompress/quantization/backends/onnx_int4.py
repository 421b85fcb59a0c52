"""4-bit weights in blocks for ONNX Runtime: the smallest file."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import OLDER, Note, has_only_avx2
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


class OnnxInt4(Backend):
    """Exports to ONNX, with 4-bit weights in blocks with a scale each, in linear layers and the word embeddings."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    keeps_layers: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(
            has_only_avx2,
            f"measured 1.2 times faster to 1.1 times slower {OLDER}: faster at batch 1 alone",
        ),
    )

    block_size: Literal[16, 32, 64, 128, 256] = 32
    """The number of weights of an output channel that share a scale. Small blocks are closer to the float model. Large
    blocks take less space (a scale has 32 bits) and are a little faster. The width of a layer need not be a
    multiple."""
    compute: Literal["int8", "float32"] = "int8"
    """The type of products. `int8` rounds a layer's inputs too, in blocks of the same size. `float32` is closer to the
    float model, and as slow."""
    embeddings: bool = True
    """Quantize the embedding tables too, which are most of the file of a small encoder."""
    embedding_bits: Literal[8, 4] = 4
    """The bits of the word embeddings; positions and token types have 8."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> OnnxInt4:
        if self.says("embedding_bits") and not self.embeddings:
            raise ValueError("`embedding_bits` is for `embeddings: true`; leave it out")
        return self

    def plan(self, shape: Shape) -> Shape:
        from hfcompress.quantization.graphs.embeddings import count_stored_bits

        bits = 4 + 32 / self.block_size
        width = shape.embedding_rank or shape.embedding or shape.hidden
        words = count_stored_bits(self.embedding_bits, width) if self.embeddings else 32
        return replace(shape, linear_bits=bits, head_bits=bits, embedding_bits=words)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.models.linears import linears
        from hfcompress.onnx.export import load_and_export
        from hfcompress.onnx.graph_io import write_model_directory
        from hfcompress.quantization.graphs.embeddings import quantize_embeddings
        from hfcompress.quantization.graphs.int4 import quantize_linears

        model, graph = load_and_export(job.source, job.auto_class, job.dummy_inputs)
        odd = self.find_odd_weights(linears(model), job)
        quantize_linears(graph, self.block_size, self.compute, job.keep)
        if self.embeddings:
            quantize_embeddings(graph, self.embedding_bits)
        return QuantizedModel(write_model_directory(graph, model.config, job.target, job.dummy_inputs, "int4"), odd)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        from hfcompress.quantization.grids.blockwise import fake_quantize_blockwise

        return fake_quantize_blockwise(weight, self.block_size)

    def training_overlay(
        self, model: PreTrainedModel, job: QuantizationJob, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.fake_quantization import FakeQuantization

        return FakeQuantization(self.fake_quantize, self.embedding_bits if self.embeddings else None)
