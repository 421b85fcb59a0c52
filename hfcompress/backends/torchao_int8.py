"""int8 through torchao."""

from __future__ import annotations

from typing import Any, ClassVar

from hfcompress.backends.torchao_int8_weight_only import TorchaoInt8WeightOnly


class TorchaoInt8(TorchaoInt8WeightOnly):
    """int8 weights per channel, inputs rounded token by token: for GPUs, and for large batches on CPUs with VNNI."""

    source: ClassVar[str] = "https://docs.pytorch.org/ao"

    def config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()
