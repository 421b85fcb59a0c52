"""int8 weights and activations for OpenVINO."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hfcompress.models.linears import linears
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import Note, lacks_vnni
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.backends.onnx_int8 import OnnxInt8
from hfcompress.quantization.calibration import Method, iterate_rows
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


class OpenvinoInt8(Backend):
    """Exports to OpenVINO, with weights, activations and embeddings in int8, or only the weights and embeddings.

    OpenVINO computes the other operators in bfloat16 on a CPU that has it, else in float32.
    """

    source: ClassVar[str] = (
        "https://docs.openvino.ai/2024/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html"
    )
    extra: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "openvino", "nncf")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    keeps_layers: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(
            lacks_vnni,
            "without VNNI, int8 was measured 1.2 to 1.4 times slower than OpenVINO's own float32 on a processor with "
            "AVX2 alone (MiniLM-L6, 1 thread)",
        ),
    )

    method: Literal["nncf", "qdq"] = "nncf"
    """The quantizer. `nncf`: `nncf.quantize`, OpenVINO's own, which finds ranges on train rows, moves outliers of
    activations into weights, and corrects biases. `qdq`: the graph of `onnx_int8` with `mode: static`, which OpenVINO
    reads unchanged; quantization-aware training needs it."""
    preset: Literal["mixed", "performance"] = "mixed"
    """The grid of activations by `nncf`: `mixed` has a zero point, `performance` has none and can be faster."""
    weights_only: bool = False
    """Quantize only weights and embeddings; nothing is calibrated."""
    calibration: Method = "minmax"
    """The method for the ranges of `qdq`, as in `onnx_int8`."""
    percentile: float = Field(default=99.999, gt=50, le=100)
    """The percentage of the inputs that `calibration: percentile` keeps within the range."""
    rows: int = Field(default=300, ge=1)
    """The number of train rows for the ranges of activations; padding does not count."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> OpenvinoInt8:
        if self.weights_only:
            for key in self.says("method", "preset", "rows"):
                raise ValueError(
                    f"`{key}` is about activations, and `weights_only` does not quantize them: leave it out"
                )
        for key in self.says("calibration", "percentile"):
            if self.method != "qdq":
                raise ValueError(f"`{key}` is for `method: qdq`; leave it out")
        if self.says("preset") and self.method != "nncf":
            raise ValueError("`preset` is for `method: nncf`; leave it out")
        if self.says("percentile") and self.calibration != "percentile":
            raise ValueError("`percentile` is for `calibration: percentile`; leave it out")
        return self

    @property
    def static(self) -> OnnxInt8:
        """The backend that makes the graph of `qdq`, and that simulates rounding as `nncf` does it."""
        made = OnnxInt8(mode="static", calibration=self.calibration, rows=self.rows)
        return made.model_copy(update={"percentile": self.percentile})

    @property
    def training_ranges(self) -> tuple[str, ...]:
        return self.static.training_ranges if self.method == "qdq" else ()

    def untrainable(self) -> str:
        if self.method == "qdq":
            return ""
        return "only the graph of `method: qdq` can be simulated exactly in training"

    def plan(self, shape: Shape) -> Shape:
        return self.static.plan(shape)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.quantization.graphs.openvino import load_and_convert, write_openvino_directory

        model, graph, converted = load_and_convert(job)
        odd = self.find_odd_weights(linears(model), job)
        quantized = self._quantize(model, graph, converted, job)
        return QuantizedModel(write_openvino_directory(quantized, model.config, job), odd)

    def _quantize(self, model: PreTrainedModel, graph: onnx.ModelProto, converted: Any, job: QuantizationJob) -> Any:
        from hfcompress.quantization.graphs import openvino

        kept = openvino.find_kept_nodes(graph, job.keep)
        if self.weights_only:
            return openvino.compress_weights(converted, kept)
        if self.method == "qdq":
            return openvino.convert(self.static.quantize_graph(model, graph, job))
        rows = list(iterate_rows(job.rows(self.rows), [node.name for node in graph.graph.input]))
        if not rows:
            raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
        return openvino.quantize(converted, rows, self.preset, kept)

    def calibrate(self, job: QuantizationJob) -> Ranges | None:
        return self.static.calibrate(job) if self.method == "qdq" else None

    def fake_quantize(self, weight: Tensor) -> Tensor:
        return self.static.fake_quantize(weight)

    @contextmanager
    def simulate(self, model: PreTrainedModel, paths: Collection[str], job: QuantizationJob) -> Iterator[None]:
        with super().simulate(model, paths, job) if self.weights_only else self.static.simulate(model, paths, job):
            yield

    def training_overlay(
        self, model: PreTrainedModel, job: QuantizationJob, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        return self.static.training_overlay(model, job, ranges, freeze)
