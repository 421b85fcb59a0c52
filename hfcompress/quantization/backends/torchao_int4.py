"""4-bit weights by torchao, for export to ExecuTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import (
    NEWER,
    OLDER,
    UNMEASURED_ARM,
    UNMEASURED_GPU,
    UNMEASURED_PROCESSOR,
    Note,
    has_avx512,
    has_only_avx2,
    lacks_tensor_cores,
)
from hfcompress.quantization.backends.base import QuantizationJob
from hfcompress.quantization.backends.torchao_int8_weight_only import TorchaoInt8WeightOnly
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


class TorchaoInt4(TorchaoInt8WeightOnly):
    """Stores linear layers in groups of 4-bit weights, for export to ExecuTorch; each weight takes a byte in the file.

    It is slower than float32 on a CPU, and larger than int8. onnx_int4 gives a small and fast file.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, f"measured 1.6 times slower {OLDER}"),
        Note(has_avx512, f"measured 1.1 to 2.0 times slower {NEWER}"),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("int8"),
        UNMEASURED_GPU,
    )

    group_size: Literal[32, 64, 128] = 32
    """The number of weights in a row that share a scale."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8 + (32 + 8) / self.group_size)

    def problems(self, shape: Shape) -> list[str]:
        widths = {shape.hidden, *(x.heads * shape.head_dim for x in shape.layers), *(x.ffn for x in shape.layers)}
        odd = sorted(width for width in widths if width % self.group_size)
        inputs = ", ".join(map(str, odd))
        return [f"groups of {self.group_size} weights do not divide linear layers with {inputs} inputs"] if odd else []

    def config(self) -> Any:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        return IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(self.group_size),
        )

    def find_layers(self, model: nn.Module, job: QuantizationJob) -> dict[str, nn.Linear]:
        found = super().find_layers(model, job)
        for path, layer in found.items():
            if layer.in_features % self.group_size:
                raise HfcompressError(
                    f"{path} has {layer.in_features} inputs, which groups of {self.group_size} do not divide",
                    "prune to multiples of the group size, or use onnx_int4",
                )
        return found

    def training_overlay(
        self, model: PreTrainedModel, job: QuantizationJob, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.torchao_training import TorchaoTraining

        return TorchaoTraining(model, self.config(), self.find_layers(model, job))
