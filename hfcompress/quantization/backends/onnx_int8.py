"""ONNX Runtime int8."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from hfcompress.models.linears import linears
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work
from hfcompress.quantization.calibration import Method, calibrate
from hfcompress.quantization.grids.ranges import LARGEST, LEVELS, Ranges, affine, weight_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization

REDUCED = 64
"""The largest weight of 7 bits: twice 255 · 64, the sum of two products, is still an int16."""


class OnnxInt8(Backend):
    """Exported to ONNX, int8 weights and uint8 activations in every linear layer; the embeddings in int8 too."""

    source: ClassVar[str] = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
    extra: ClassVar[str] = "onnx"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    mixed: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"

    mode: Literal["dynamic", "static"] = "dynamic"
    """Where the grid of a layer's inputs comes from: `dynamic` spans each batch as it comes, padding included;
    `static` is calibrated once on rows of the train split, without padding, so that a row's answer does not depend on
    the rows beside it. Training feels the rounded inputs where they are static; where they are dynamic, the rounded
    weights alone."""
    per_channel: bool = True
    """One scale an output channel instead of one a matrix."""
    reduce_range: bool = False
    """Weights of 7 bits, for x86 processors without VNNI (before 2019's Cascade Lake and 2022's Zen 4): they add two
    products in 16 bits, which 8-bit weights overflow."""
    embeddings: bool = True
    """Quantize the embedding tables too: in a small encoder they are most of the file."""
    embedding_bits: Literal[8, 4] = 8
    """Of the word embeddings."""
    calibration: Method = "minmax"
    """How a static range is found: `minmax` is all that was seen, `percentile` cuts both ends, `entropy` cuts where
    the least information is lost."""
    percentile: float = Field(default=99.999, gt=50, le=100)
    """The share of the inputs, in percent, that `percentile` leaves within the range."""
    rows: int = Field(default=512, ge=1)
    """Rows of the train split that are read to calibrate."""
    _calibrated: dict[Path, Ranges] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _nothing_idle(self) -> OnnxInt8:
        for key in self.says("calibration", "percentile", "rows"):
            if self.mode != "static":
                raise ValueError(f"`{key}` is for `mode: static`; leave it out")
        if self.says("percentile") and self.calibration != "percentile":
            raise ValueError("`percentile` is for `calibration: percentile`; leave it out")
        if self.says("embedding_bits") and not self.embeddings:
            raise ValueError("`embedding_bits` is for `embeddings: true`; leave it out")
        return self

    def untrainable(self) -> str:
        if self.mode == "dynamic" and not self.per_channel:
            return "queries, keys and values share one scale in a dynamic graph, which training does not feel"
        return ""

    @property
    def trained_ranges(self) -> tuple[str, ...]:
        if self.mode == "dynamic":
            return ()
        return ("ema", "learned") if self.per_channel and not self.reduce_range else ("ema",)

    def plan(self, shape: Shape) -> Shape:
        from hfcompress.quantization.graphs.embeddings import bits_stored

        width = shape.embedding_rank or shape.embedding or shape.hidden
        words = bits_stored(self.embedding_bits, width) if self.embeddings else 32
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=words)

    def quantize(self, work: Work) -> NDArray[Any]:
        from hfcompress.onnx.model_directory import exported, stored
        from hfcompress.quantization.graphs.embeddings import quantize_embeddings
        from hfcompress.quantization.graphs.int8 import dynamic, static

        model, graph = exported(work.source, work.auto_class, work.probe)
        self.note_odd_weights(linears(model), work)
        if self.mode == "dynamic":
            graph = dynamic(graph, work.keep, self.per_channel, self.reduce_range)
        else:
            graph = static(graph, self._grid(model, work), work.keep)
        if self.embeddings:
            quantize_embeddings(graph, self.embedding_bits)
        return stored(graph, model.config, work.target, work.probe)

    def _steps(self, weight: Tensor) -> Tensor:
        return weight_steps(weight, self.per_channel, REDUCED if self.reduce_range else LARGEST)

    def _grid(self, model: PreTrainedModel, work: Work) -> Ranges:
        """Ranges and steps of every linear layer: trained ones, or calibrated once on the source."""
        ranges = work.ranges or self._calibrated.get(work.source)
        if ranges is None:
            ranges = self._calibrated[work.source] = calibrate(
                model, work.rows(self.rows), self.calibration, self.percentile
            )
        steps = {path: self._steps(layer.weight) for path, layer in linears(model).items()}
        return Ranges(ranges.inputs, {**steps, **ranges.steps})

    def rounded(self, weight: Tensor) -> Tensor:
        return _on_steps(weight, self._steps(weight))

    @contextmanager
    def simulated(self, model: PreTrainedModel, paths: Collection[str], work: Work) -> Iterator[None]:
        """Inputs are rounded too, on the grid of each batch or on the one that was calibrated."""
        import torch

        grid = self._grid(model, work) if self.mode == "static" else None
        layers = {path: layer for path, layer in linears(model).items() if path in paths}
        before = {path: layer.weight.data for path, layer in layers.items()}

        def hook(path: str) -> Any:
            def on_grid(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
                low, high = grid.inputs[path] if grid else (float(end) for end in inputs[0].aminmax())
                return torch.fake_quantize_per_tensor_affine(inputs[0], *affine(low, high), 0, LEVELS)

            return on_grid

        handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
        try:
            for path, layer in layers.items():
                layer.weight.data = _on_steps(before[path], grid.steps[path] if grid else self._steps(before[path]))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for path, layer in layers.items():
                layer.weight.data = before[path]

    def masks(
        self, model: PreTrainedModel, work: Work, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.fake_quantization import FakeQuantization
        from hfcompress.quantization.qat.learned_steps import LearnedSteps
        from hfcompress.quantization.qat.moving_average import FollowedRanges

        table_bits = self.embedding_bits if self.embeddings else None
        if self.mode == "dynamic":
            return FakeQuantization(self.rounded, table_bits)
        grid = self._grid(model, work)
        if ranges == "learned":
            return LearnedSteps(model, grid, freeze, table_bits)
        return FollowedRanges(model, self.rounded, grid, freeze, table_bits)


def _on_steps(weight: Tensor, steps: Tensor) -> Tensor:
    steps = steps.to(weight.device).unsqueeze(-1)
    return (weight / steps).round().clamp(-LARGEST, LARGEST) * steps
