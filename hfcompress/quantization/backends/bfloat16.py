"""bfloat16: half the bytes, and the range of float32."""

from __future__ import annotations

from typing import ClassVar

from hfcompress.quantization.advice import (
    OLDER,
    UNMEASURED_GPU,
    UNMEASURED_PROCESSOR,
    Note,
    lacks_bfloat16,
    lacks_tensor_cores,
)
from hfcompress.quantization.backends.float16 import Float16


class Bfloat16(Float16):
    """Stores and computes everything in bfloat16: half the bytes, and the range of float32."""

    source: ClassVar[str] = "Kalamkar et al. 2019, arXiv:1905.12322"
    dtype: ClassVar[str] = "bfloat16"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(lacks_bfloat16, f"measured 3.6 to 4.8 times slower {OLDER}: this one has no bfloat16 either"),
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("bfloat16"),
        UNMEASURED_GPU,
    )
