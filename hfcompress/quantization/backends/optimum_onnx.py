"""int8 for ONNX Runtime, by Optimum's exporter and quantizer."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from hfcompress.measure.environment import cpu_flags
from hfcompress.models.architectures import PRUNED, task_head_of
from hfcompress.models.shape import Shape
from hfcompress.models.weights import GRAPH_FILES
from hfcompress.onnx.export import OPTIMUM_TASKS, quiet
from hfcompress.onnx.graph_io import LIMIT, require_same_logits, run_onnx, write_graph_config
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.calibration import iterate_rows
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from hfcompress.measure.process import Batch

LINEAR, TABLES = ["MatMul", "Gemm"], ["Gather"]
"""The operators to quantize. Optimum's default is every operator with an int8 kernel in onnxruntime; calibration by
percentile or entropy then fails on the graph's small integers."""


class OptimumOnnx(Backend):
    """Exports with Optimum and quantizes with its ORTQuantizer: int8 weights, with dynamic or static activations."""

    source: ClassVar[str] = "https://huggingface.co/docs/optimum-onnx/onnxruntime/usage_guides/quantization"
    extra: ClassVar[str] = "optimum"
    modules: ClassVar[tuple[str, ...]] = ("optimum.onnxruntime",)
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)

    mode: Literal["dynamic", "static"] = "dynamic"
    """The source of the ranges of activations: each batch (`dynamic`), or train rows (`static`)."""
    instructions: Literal["auto", "avx2", "avx512", "avx512_vnni", "arm64"] = "auto"
    """Optimum's configuration for a processor; `auto` chooses that of this machine. With avx2 weights are uint8."""
    per_channel: bool = True
    """One scale for each output channel instead of one for the matrix."""
    embeddings: bool = True
    """Quantize the embedding tables too."""
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax"
    """The method for static ranges, as in `onnx_int8`."""
    percentile: float = Field(default=99.999, gt=50, le=100)
    """The percentage of the values that `calibration: percentile` keeps within the range."""
    rows: int = Field(default=128, ge=1)
    """The number of train rows for static ranges."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> OptimumOnnx:
        for key in self.says("calibration", "percentile", "rows"):
            if self.mode == "dynamic":
                raise ValueError(f"`{key}` is for `mode: static`; leave it out")
        if self.calibration != "percentile" and self.says("percentile"):
            raise ValueError("`percentile` is for `calibration: percentile`; leave it out")
        return self

    @property
    def rounds_by_batch(self) -> bool:
        return self.mode == "dynamic"

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=8 if self.embeddings else 32)

    def problems(self, shape: Shape) -> list[str]:
        if 4 * shape.parameters > LIMIT:
            return [
                f"the exported graph would be {4 * shape.parameters / 1e9:.1f} GB, and Optimum's quantizer takes less "
                "than 2 GB: use onnx_int8, which keeps larger graphs in two files"
            ]
        if shape.head in OPTIMUM_TASKS:
            return []
        return [f"optimum exports a model with a {shape.head} task head only with a cache: use onnx_int8"]

    def unavailable(self) -> tuple[str, str] | None:
        version = importlib.metadata.version("transformers")
        if tuple(map(int, version.split(".")[:2])) < (4, 58):
            return super().unavailable()
        return (
            f"optimum-onnx needs transformers below 4.58, and {version} is installed",
            "pip install 'hfcompress[optimum]' 'transformers==4.57.6' in an environment of its own, or use onnx_int8",
        )

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.models.artifact import load_model

        model = load_model(job.source, job.auto_class)
        with scratch_directory() as folder, quiet(), redirect_stdout(StringIO()):
            graph = folder / "model.onnx"
            _export(model, job.auto_class, graph)
            require_same_logits(run_onnx(graph, job.dummy_inputs), model, job.dummy_inputs)
            if self.embeddings:
                # In a separate dynamic pass: a whole static table would be dequantized in each run.
                graph = self._quantize(graph, folder / "tables", TABLES)
            ranges = self._calibrate(graph, job.rows(self.rows)) if self.mode == "static" else None
            made, path = self._quantize(graph, folder / "made", LINEAR, ranges), job.target / GRAPH_FILES["int8"]
            path.parent.mkdir()
            shutil.move(made, path)
            shutil.move(made.with_name("ort_config.json"), job.target)
        write_graph_config(model.config, job.target, "int8")
        return QuantizedModel(run_onnx(path, job.dummy_inputs))

    def _quantize(self, graph: Path, target: Path, operators: list[str], ranges: Any = None) -> Path:
        """Writes the graph with these operators in int8, static if ranges are given."""
        from optimum.onnxruntime import AutoQuantizationConfig, ORTQuantizer

        kind = detect_instructions() if self.instructions == "auto" else self.instructions
        make = getattr(AutoQuantizationConfig, kind)
        config = make(
            is_static=ranges is not None,
            per_channel=self.per_channel,
            operators_to_quantize=operators,
            nodes_to_exclude=find_activation_products(graph),
        )
        quantizer = ORTQuantizer(graph)
        quantizer.quantize(config, target, file_suffix=None, calibration_tensors_range=ranges)
        return target / "model.onnx"

    def _calibrate(self, graph: Path, batches: Sequence[Batch]) -> Any:
        """Finds the range of each linear layer's activations over rows without padding.

        It calls the calibrator behind `ORTQuantizer.fit` with one row after the other: `fit` itself reads rows of equal
        length, so that padding would count, and keeps the activations of all rows in memory.
        """
        from onnxruntime.quantization import CalibrationMethod
        from optimum.onnxruntime.configuration import CalibrationConfig
        from optimum.onnxruntime.quantization import ORTCalibrationDataReader

        method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[self.calibration]
        config = CalibrationConfig(
            dataset_name="train",
            dataset_config_name="",
            dataset_split="train",
            dataset_num_samples=self.rows,
            method=CalibrationMethod[method],
            num_bins=2048 if self.calibration == "percentile" else 128,
            num_quantized_bins=128,
            percentile=self.percentile,
        )
        calibrator = config.create_calibrator(
            graph, LINEAR, augmented_model_name=str(graph.with_name("augmented.onnx"))
        )
        names = {node.name for node in calibrator.infer_session.get_inputs()}
        rows = list(iterate_rows(batches, names))
        if not rows:
            raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
        for row in rows:  # the reader adds the axis of rows again
            calibrator.collect_data(ORTCalibrationDataReader([{name: values[0] for name, values in row.items()}]))
        return calibrator.compute_data()


def detect_instructions() -> str:
    """Returns the name of Optimum's configuration for this machine's processor."""
    if platform.machine() in ("arm64", "aarch64"):
        return "arm64"
    flags = cpu_flags()
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        return "avx512_vnni"
    return "avx512" if "avx512f" in flags else "avx2"


def _export(model: Any, auto_class: str, path: Path) -> None:
    """Exports a model, pruned or not, by Optimum."""
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    kind, head = str(model.config.model_type).removeprefix(PRUNED), task_head_of(auto_class) or "sequence"
    try:
        make = TasksManager.get_exporter_config_constructor(
            "onnx", model_type=kind, task=OPTIMUM_TASKS[head], library_name="transformers"
        )
    except (KeyError, ValueError):
        message = f"optimum's exporter does not know a {kind} model with a {head} task head"
        raise HfcompressError(message, "use onnx_int8") from None
    export(model, make(model.config), path)
    if head == "span":
        _add_logits(path)


def _add_logits(path: Path) -> None:
    """Adds the output `logits` `(rows, length, 2)` before a span head's two outputs, which Optimum's classes read."""
    import onnx
    from onnx import helper

    made = onnx.load(path)
    graph = made.graph
    last = helper.make_tensor("last_axis", onnx.TensorProto.INT64, [1], [-1])
    graph.initializer.append(last)
    sides = [output.name for output in graph.output]
    for side in sides:
        graph.node.append(helper.make_node("Unsqueeze", [side, "last_axis"], [f"{side}_column"]))
    graph.node.append(helper.make_node("Concat", [f"{side}_column" for side in sides], ["logits"], axis=-1))
    axes = [graph.output[0].type.tensor_type.shape.dim[axis].dim_param for axis in range(2)]
    graph.output.insert(0, helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [*axes, 2]))
    onnx.save(made, path)


def find_activation_products(path: Path) -> list[str]:
    """Finds the nodes that multiply one activation by another, such as queries by keys."""
    import onnx

    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not stored & set(node.input)]
