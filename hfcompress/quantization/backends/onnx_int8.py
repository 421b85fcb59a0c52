"""int8 weights and activations for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hfcompress.models.artifact import load_model
from hfcompress.models.linears import linears
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import Note, lacks_vnni
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel, swap_weights
from hfcompress.quantization.calibration import Method, calibrate
from hfcompress.quantization.grids.ranges import LARGEST, LEVELS, Ranges, scale_and_zero_point, weight_scales

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization

REDUCED = 64
"""The largest weight of 7 bits: the sum of two products, twice 255 · 64, still fits into 16 bits."""


class OnnxInt8(Backend):
    """Exports to ONNX, with int8 weights and uint8 activations in all linear layers, and int8 embeddings."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    searched: ClassVar[bool] = True
    keeps_layers: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(
            lacks_vnni,
            "without VNNI the int8 products saturate, which can cost accuracy: see the report, or say "
            "`reduce_range: true`",
        ),
    )

    mode: Literal["dynamic", "static"] = "dynamic"
    """The source of the range of a layer's inputs. `dynamic`: each batch, with its padding. `static`: a calibration on
    train rows without padding, so that an answer does not depend on the other rows of the batch. Quantization-aware
    training rounds weights; with `static` it rounds the inputs too."""
    per_channel: bool = True
    """One scale for each output channel instead of one for the matrix."""
    reduce_range: bool = False
    """Use weights of 7 bits, for x86 processors without VNNI (before Cascade Lake, 2019, and Zen 4, 2022). These add
    two products in 16 bits, which overflow with 8-bit weights."""
    embeddings: bool = True
    """Quantize the embedding tables too, which are most of the file of a small encoder."""
    embedding_bits: Literal[8, 4] = 8
    """The bits of the word embeddings."""
    calibration: Method = "minmax"
    """The method for static ranges: `minmax` takes the smallest and largest value, `percentile` cuts both ends, and
    `entropy` cuts at the value that loses the least information."""
    percentile: float = Field(default=99.999, gt=50, le=100)
    """The percentage of the inputs that `percentile` keeps within the range."""
    rows: int = Field(default=512, ge=1)
    """The number of train rows for the calibration."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> OnnxInt8:
        for key in self.says("calibration", "percentile", "rows"):
            if self.mode != "static":
                raise ValueError(f"`{key}` is for `mode: static`; leave it out")
        if self.says("percentile") and self.calibration != "percentile":
            raise ValueError("`percentile` is for `calibration: percentile`; leave it out")
        if self.says("embedding_bits") and not self.embeddings:
            raise ValueError("`embedding_bits` is for `embeddings: true`; leave it out")
        return self

    @property
    def rounds_by_batch(self) -> bool:
        return self.mode == "dynamic"

    def untrainable(self) -> str:
        if self.mode == "dynamic" and not self.per_channel:
            return "queries, keys and values share one scale in a dynamic graph, which the training cannot simulate"
        return ""

    @property
    def training_ranges(self) -> tuple[str, ...]:
        if self.mode == "dynamic":
            return ()
        return ("ema", "learned") if self.per_channel and not self.reduce_range else ("ema",)

    def plan(self, shape: Shape) -> Shape:
        from hfcompress.quantization.graphs.embeddings import count_stored_bits

        width = shape.embedding_rank or shape.embedding or shape.hidden
        words = count_stored_bits(self.embedding_bits, width) if self.embeddings else 32
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=words)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.onnx.export import load_and_export
        from hfcompress.onnx.graph_io import write_model_directory

        model, graph = load_and_export(job.source, job.auto_class, job.dummy_inputs)
        odd = self.find_odd_weights(linears(model), job)
        graph = self.quantize_graph(model, graph, job)
        return QuantizedModel(write_model_directory(graph, model.config, job.target, job.dummy_inputs, "int8"), odd)

    def quantize_graph(self, model: PreTrainedModel, graph: onnx.ModelProto, job: QuantizationJob) -> onnx.ModelProto:
        """Returns the quantized graph of a float model and its float graph."""
        from hfcompress.quantization.graphs.embeddings import quantize_embeddings
        from hfcompress.quantization.graphs.int8 import quantize_dynamic, quantize_static

        if self.mode == "dynamic":
            graph = quantize_dynamic(graph, job.keep, self.per_channel, self.reduce_range)
        else:
            graph = quantize_static(graph, self._complete_ranges(model, job), job.keep)
        if self.embeddings:
            quantize_embeddings(graph, self.embedding_bits)
        return graph

    def _scales(self, weight: Tensor) -> Tensor:
        return weight_scales(weight, self.per_channel, REDUCED if self.reduce_range else LARGEST)

    def calibrate(self, job: QuantizationJob) -> Ranges | None:
        if self.mode == "dynamic" or job.ranges is not None:
            return job.ranges
        return self._complete_ranges(load_model(job.source, job.auto_class), job)

    def _complete_ranges(self, model: PreTrainedModel, job: QuantizationJob) -> Ranges:
        """Returns the ranges and weight scales of all linear layers: those of the job, or calibrated ones."""
        ranges = job.ranges or calibrate(model, job.rows(self.rows), self.calibration, self.percentile)
        scales = {path: self._scales(layer.weight) for path, layer in linears(model).items()}
        return Ranges(ranges.inputs, {**scales, **ranges.scales})

    def fake_quantize(self, weight: Tensor) -> Tensor:
        return _fake_quantize(weight, self._scales(weight))

    @contextmanager
    def simulate(self, model: PreTrainedModel, paths: Collection[str], job: QuantizationJob) -> Iterator[None]:
        """Rounds weights and inputs; inputs by the range of each batch or by the calibrated one."""
        import torch

        ranges = self._complete_ranges(model, job) if self.mode == "static" else None
        layers = {path: layer for path, layer in linears(model).items() if path in paths}
        scales = ranges.scales if ranges else {path: self._scales(layer.weight) for path, layer in layers.items()}
        weights = {path: _fake_quantize(layer.weight.data, scales[path]) for path, layer in layers.items()}

        def hook(path: str) -> Any:
            def round_inputs(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
                low, high = ranges.inputs[path] if ranges else (float(end) for end in inputs[0].aminmax())
                return torch.fake_quantize_per_tensor_affine(inputs[0], *scale_and_zero_point(low, high), 0, LEVELS)

            return round_inputs

        handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
        try:
            with swap_weights(layers, weights):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def training_overlay(
        self, model: PreTrainedModel, job: QuantizationJob, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.fake_quantization import FakeQuantization
        from hfcompress.quantization.qat.learned_steps import LearnedStepSizes
        from hfcompress.quantization.qat.moving_average import MovingAverageRanges

        table_bits = self.embedding_bits if self.embeddings else None
        if self.mode == "dynamic":
            return FakeQuantization(self.fake_quantize, table_bits)
        complete = self._complete_ranges(model, job)
        if ranges == "learned":
            return LearnedStepSizes(model, complete, freeze, table_bits)
        return MovingAverageRanges(model, self.fake_quantize, complete, freeze, table_bits)


def _fake_quantize(weight: Tensor, scales: Tensor) -> Tensor:
    scales = scales.to(weight.device).unsqueeze(-1)
    return (weight / scales).round().clamp(-LARGEST, LARGEST) * scales
