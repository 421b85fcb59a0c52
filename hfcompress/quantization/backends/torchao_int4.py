"""4-bit weights through torchao."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Work
from hfcompress.quantization.backends.torchao_int8_weight_only import TorchaoInt8WeightOnly
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfcompress.quantization.qat.fake_quantization import FakeQuantization


class TorchaoInt4(TorchaoInt8WeightOnly):
    """4-bit linear layers in groups, for export to ExecuTorch: in the file each weight still takes a byte.

    Slower than float32 on a CPU, and larger than int8; for a small and fast file take onnx_int4.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "fake_quantization"

    group_size: Literal[32, 64, 128] = 32
    """Weights in a row that share a scale."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8 + (32 + 8) / self.group_size)

    def problems(self, shape: Shape) -> list[str]:
        widths = {shape.hidden, *(x.heads * shape.head_dim for x in shape.layers), *(x.ffn for x in shape.layers)}
        odd = sorted(width for width in widths if width % self.group_size)
        told = ", ".join(map(str, odd))
        return [f"groups of {self.group_size} weights do not divide linear layers with {told} inputs"] if odd else []

    def config(self) -> Any:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        return IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(self.group_size),
        )

    def layers(self, model: nn.Module, work: Work) -> dict[str, nn.Linear]:
        found = super().layers(model, work)
        for path, layer in found.items():
            if layer.in_features % self.group_size:
                raise HfcompressError(
                    f"{path} has {layer.in_features} inputs, which groups of {self.group_size} do not divide",
                    "prune to multiples of the group, or use onnx_int4",
                )
        return found

    def masks(
        self, model: PreTrainedModel, work: Work, ranges: Literal["ema", "learned"], freeze: float
    ) -> FakeQuantization:
        from hfcompress.quantization.qat.torchao_training import TorchaoTraining

        return TorchaoTraining(model, self.config(), self.layers(model, work))
