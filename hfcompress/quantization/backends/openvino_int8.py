"""int8 for OpenVINO, by Optimum Intel."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from hfcompress.models.architectures import PRUNED, task_head_of
from hfcompress.models.shape import Shape
from hfcompress.onnx.export import OPTIMUM_TASKS, quiet
from hfcompress.onnx.graph_io import EXPORT_TOLERANCE, write_config
from hfcompress.quantization.advice import Note, lacks_vnni
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.calibration import iterate_rows
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from hfcompress.models.dummy_inputs import DummyInputs

TRANSFORMERS = (5, 6)
"""The first release that optimum-intel 2.2 does not support."""
ENVIRONMENT = (
    "give it an environment of its own: python -m venv .venv-openvino && "
    ".venv-openvino/bin/pip install 'hfcompress[openvino]' && .venv-openvino/bin/pip uninstall -y torchvision"
)


class OpenvinoInt8(Backend):
    """Exports to OpenVINO by Optimum Intel, with weights and activations in int8, or only the weights.

    OpenVINO computes the float operators in bfloat16 on a CPU that has it, else in float32.
    """

    source: ClassVar[str] = "https://huggingface.co/docs/optimum-intel/openvino/optimization"
    extra: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("optimum.intel", "openvino", "nncf")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    notes: ClassVar[tuple[Note, ...]] = (
        Note(
            lacks_vnni,
            "without VNNI, int8 was measured 1.2 to 1.4 times slower than OpenVINO's own float32 on a processor with "
            "AVX2 alone (MiniLM-L6, 1 thread)",
        ),
    )

    weights_only: bool = False
    """Quantize only the weights; nothing is calibrated."""
    rows: int = Field(default=300, ge=1)
    """The number of train rows for the ranges of activations; each is read alone, without padding."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> OpenvinoInt8:
        if self.weights_only and self.says("rows"):
            raise ValueError(
                "`rows` calibrate activations, and `weights_only` does not quantize them: give only one of the two"
            )
        return self

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=8)

    def problems(self, shape: Shape) -> list[str]:
        if shape.architecture == "modernbert":
            return ["optimum-intel cannot export a modernbert model; onnx_int8 can"]
        if shape.head not in OPTIMUM_TASKS:
            return [f"openvino_int8 cannot export a {shape.head} task head; use a model that reads a text at once"]
        return []

    def unavailable(self) -> tuple[str, str] | None:
        missing, found = self.missing_modules(), importlib.metadata.version("transformers")
        if missing:
            what = f"{', '.join(missing)} is not installed"
            if _release(found) < TRANSFORMERS:
                return what, "pip install 'hfcompress[openvino]'"
            return f"{what}, and optimum-intel needs transformers<5.6 and huggingface_hub<1.22", ENVIRONMENT
        if _release(found) >= TRANSFORMERS:
            return f"optimum-intel needs transformers<5.6, and {found} is installed", ENVIRONMENT
        if _foreign_torchvision():
            what = "optimum-intel needs the registry's torchvision, which breaks transformers beside a CPU torch"
            return what, "pip uninstall -y torchvision"
        return None

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        import optimum.intel
        from optimum.exporters.openvino.convert import export_from_model

        from hfcompress.measure.worker import OpenVinoModel
        from hfcompress.models.artifact import load_model
        from hfcompress.utils.processors import default_threads

        model = load_model(job.source, job.auto_class)
        with scratch_directory() as folder, redirect_stdout(StringIO()):
            with quiet(), _with_stock_type(model):
                task = OPTIMUM_TASKS[task_head_of(job.auto_class) or "sequence"]
                export_from_model(model, folder, task=task, preprocessors=[])
            auto = getattr(optimum.intel, job.auto_class.replace("Auto", "OV", 1))
            with quiet():  # the exporter ends the first
                exported = auto.from_pretrained(folder, compile=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
                _require_same(exported, model, job.dummy_inputs)
                quantizer = optimum.intel.OVQuantizer.from_pretrained(exported)
                quantizer.quantize(**self._options(job, exported.input_names), save_directory=job.target)
        write_config(model.config, job.target)
        saved = OpenVinoModel(str(job.target), default_threads(), job.auto_class)
        return QuantizedModel(saved(saved.place(dict(job.dummy_inputs))))

    def _options(self, job: QuantizationJob, names: Any) -> dict[str, Any]:
        from optimum.intel import OVConfig, OVQuantizationConfig, OVWeightQuantizationConfig

        if self.weights_only:
            return {"ov_config": OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8))}
        import nncf

        rows = list(iterate_rows(job.rows(self.rows), names))
        if not rows:
            raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
        config = OVQuantizationConfig(num_samples=len(rows))
        return {"ov_config": OVConfig(quantization_config=config), "calibration_dataset": nncf.Dataset(rows)}


def _require_same(exported: Any, model: Any, dummy_inputs: DummyInputs) -> None:
    """Checks that the float graph, computed in float32, gives the model's logits on the dummy inputs."""
    import numpy as np
    import torch

    from hfcompress.models.dummy_inputs import logits_of
    from hfcompress.models.forward import logits_of_output

    found = logits_of_output(exported(**{name: torch.from_numpy(value) for name, value in dummy_inputs.items()}))
    expected = logits_of(model, dummy_inputs)
    difference = float(np.abs(found.numpy() - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not difference <= EXPORT_TOLERANCE:
        raise HfcompressError(f"the exported graph differs from the model by {difference:.2g} before any quantization")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _foreign_torchvision() -> bool:
    """True if pip lists a torchvision built for CUDA beside a torch built for the CPU."""
    try:
        torch, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return torch.endswith("+cpu") and "+" not in vision and platform.machine() == "x86_64"


@contextmanager
def _with_stock_type(model: Any) -> Iterator[None]:
    """Gives a pruned model the stock `model_type` while the context lasts; the exporter finds its settings by it."""
    kind = model.config.model_type
    model.config.model_type = str(kind).removeprefix(PRUNED)
    try:
        yield
    finally:
        model.config.model_type = kind
