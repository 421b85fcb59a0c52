"""int8 through torchao."""

from __future__ import annotations

from typing import Any, ClassVar

from hfcompress.quantization.backends.torchao_int8_weight_only import TorchaoInt8WeightOnly


class TorchaoInt8(TorchaoInt8WeightOnly):
    """int8 weights per channel, inputs rounded token by token: for GPUs, and for batches on CPUs with VNNI.

    On a CPU one text at a time is slower than in float32, and without VNNI everything is; torch_int8 is faster there.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"

    def config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()
