"""int8 through OpenVINO and Optimum Intel."""

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
from hfcompress.onnx.export import quiet
from hfcompress.onnx.model_directory import EXPORT_TOLERANCE, write_config
from hfcompress.quantization.backends.base import Backend, Work
from hfcompress.quantization.graphs.optimum import TASKS, rows_alone
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hfcompress.models.dummy_inputs import Probe

TRANSFORMERS = (5, 6)
"""The first release that optimum-intel 2.2 does not take."""
ENVIRONMENT = (
    "give it an environment of its own: python -m venv .venv-openvino && "
    ".venv-openvino/bin/pip install 'hfcompress[openvino]' && .venv-openvino/bin/pip uninstall -y torchvision"
)


class OpenvinoInt8(Backend):
    """Exported to OpenVINO by Optimum Intel; weights and activations in int8, or the weights alone.

    What stays float is computed as OpenVINO does by default: in bfloat16 on a CPU that has it, else in float32.
    """

    source: ClassVar[str] = "https://huggingface.co/docs/optimum-intel/openvino/optimization"
    extra: ClassVar[str] = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("optimum.intel", "openvino", "nncf")
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)

    weights_only: bool = False
    """Leave the activations in float; nothing is calibrated."""
    rows: int = Field(default=300, ge=1)
    """Rows of the train split that the ranges of the activations are taken from, each alone, so without padding."""

    @model_validator(mode="after")
    def _rows_are_read(self) -> OpenvinoInt8:
        if self.weights_only and self.says("rows"):
            raise ValueError("`rows` calibrate activations, and `weights_only` leaves those alone: give one of them")
        return self

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=8)

    def problems(self, shape: Shape) -> list[str]:
        if shape.architecture == "modernbert":
            return ["optimum-intel exports no modernbert model; onnx_int8 does"]
        if shape.head not in TASKS:
            return [f"openvino_int8 takes heads that read a text at once, and this model has a {shape.head} head"]
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
            what = "the registry's torchvision, which optimum-intel asks for, breaks transformers beside a CPU torch"
            return what, "pip uninstall -y torchvision"
        return None

    def quantize(self, work: Work) -> NDArray[Any]:
        import optimum.intel
        from optimum.exporters.openvino.convert import export_from_model

        from hfcompress.measure.worker import OpenVinoModel
        from hfcompress.models.artifact import load_model
        from hfcompress.utils.processors import default_threads

        model = load_model(work.source, work.auto_class)
        with scratch_directory() as folder, redirect_stdout(StringIO()):
            with quiet(), _of_stock_architecture(model):
                export_from_model(
                    model, folder, task=TASKS[task_head_of(work.auto_class) or "sequence"], preprocessors=[]
                )
            auto = getattr(optimum.intel, work.auto_class.replace("Auto", "OV", 1))
            with quiet():  # the exporter undid the first
                exported = auto.from_pretrained(folder, compile=False, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
                _require_same(exported, model, work.probe)
                quantizer = optimum.intel.OVQuantizer.from_pretrained(exported)
                quantizer.quantize(**self._options(work, exported.input_names), save_directory=work.target)
        write_config(model.config, work.target)
        saved = OpenVinoModel(str(work.target), default_threads(), work.auto_class)
        return saved(saved.place(dict(work.probe)))

    def _options(self, work: Work, names: Any) -> dict[str, Any]:
        from optimum.intel import OVConfig, OVQuantizationConfig, OVWeightQuantizationConfig

        if self.weights_only:
            return {"ov_config": OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8))}
        import nncf

        rows = list(rows_alone(work.rows(self.rows), names))
        if not rows:
            raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
        config = OVQuantizationConfig(num_samples=len(rows))
        return {"ov_config": OVConfig(quantization_config=config), "calibration_dataset": nncf.Dataset(rows)}


def _require_same(exported: Any, model: Any, probe: Probe) -> None:
    """Passes where the float graph, computed in float32, gives the model's logits on the probe."""
    import numpy as np
    import torch

    from hfcompress.models.dummy_inputs import logits_of
    from hfcompress.models.forward import logits_of_output

    found = logits_of_output(exported(**{name: torch.from_numpy(value) for name, value in probe.items()}))
    expected = logits_of(model, probe)
    difference = float(np.abs(found.numpy() - expected).max()) / max(1.0, float(np.abs(expected).max()))
    if not difference <= EXPORT_TOLERANCE:
        raise HfcompressError(f"the exported graph differs from the model by {difference:.2g} before any quantization")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _foreign_torchvision() -> bool:
    """Whether there is a torchvision built for CUDA beside a torch built for the CPU, told by what pip noted."""
    try:
        torch, vision = (importlib.metadata.version(name) for name in ("torch", "torchvision"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return torch.endswith("+cpu") and "+" not in vision and platform.machine() == "x86_64"


@contextmanager
def _of_stock_architecture(model: Any) -> Iterator[None]:
    """The exporter looks up by `model_type` how a model is called; a pruned one is called as a stock one is."""
    kind = model.config.model_type
    model.config.model_type = str(kind).removeprefix(PRUNED)
    try:
        yield
    finally:
        model.config.model_type = kind
