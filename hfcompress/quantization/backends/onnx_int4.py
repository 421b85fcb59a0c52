"""ONNX Runtime in blocks of 4-bit weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


class OnnxInt4(Backend):
    """Exported to ONNX, 4-bit weights in blocks with a scale each in every linear layer and the words' table."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    mixed: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"

    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights of an output channel that share a scale: smaller ones are closer to the float model, larger ones
    smaller (a scale is 32 bits) and, a little, faster. Any width will do."""
    compute: Literal["int8", "float32"] = "int8"
    """What is multiplied: `int8` rounds a layer's inputs too, in blocks of the same size; `float32` is closer to the
    float model, and as slow."""
    embeddings: bool = True
    """Quantize the embedding tables too: in a small encoder they are most of the file."""
    embedding_bits: Literal[8, 4] = 4
    """Of the word embeddings; positions and token types have 8."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> OnnxInt4:
        if self.says("embedding_bits") and not self.embeddings:
            raise ValueError("`embedding_bits` is for `embeddings: true`; leave it out")
        return self

    def plan(self, shape: Shape) -> Shape:
        from hfcompress.quantization.graphs.embeddings import bits_stored

        bits = 4 + 32 / self.block_size
        width = shape.embedding_rank or shape.embedding or shape.hidden
        words = bits_stored(self.embedding_bits, width) if self.embeddings else 32
        return replace(shape, linear_bits=bits, head_bits=bits, embedding_bits=words)

    def quantize(self, work: Work) -> NDArray[Any]:
        from hfcompress.models.linears import linears
        from hfcompress.onnx.model_directory import exported, stored
        from hfcompress.quantization.graphs.embeddings import quantize_embeddings
        from hfcompress.quantization.graphs.int4 import quantize_linears

        model, graph = exported(work.source, work.auto_class, work.probe)
        self.note_odd_weights(linears(model), work)
        quantize_linears(graph, self.block_size, self.compute, work.keep)
        if self.embeddings:
            quantize_embeddings(graph, self.embedding_bits)
        return stored(graph, model.config, work.target, work.probe)

    def rounded(self, weight: Tensor) -> Tensor:
        from hfcompress.quantization.grids.blocks import rounded_blocks

        return rounded_blocks(weight, self.block_size)

    def masks(
        self, model: PreTrainedModel, work: Work, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.fake_quantization import FakeQuantization

        return FakeQuantization(self.rounded, self.embedding_bits if self.embeddings else None)
