"""int8 weights and activations by torchao: for GPUs, and for batches on CPUs with VNNI."""

from __future__ import annotations

from typing import Any, ClassVar

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
    lacks_vnni,
)
from hfcompress.quantization.backends.torchao_int8_weight_only import TorchaoInt8WeightOnly


class TorchaoInt8(TorchaoInt8WeightOnly):
    """Stores linear layers in int8 and rounds their inputs token by token: for GPUs, and for batches on CPUs with VNNI.

    On a CPU, single texts are slower than in float32; without VNNI batches are too. torch_int8 is faster there.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, f"measured 22 times slower {OLDER}"),
        Note(has_avx512, f"measured as fast to 1.4 times slower {NEWER}"),
        Note(
            lacks_vnni,
            "PyTorch's int8 products overflow without VNNI, measured as up to a third of the largest product of 64 "
            "terms; use torch_int8 or onnx_int8",
        ),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("int8"),
        UNMEASURED_GPU,
    )

    def config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()
