"""Brain floating point."""

from __future__ import annotations

from typing import ClassVar

from hfcompress.quantization.backends.float16 import Float16


class Bfloat16(Float16):
    """Every weight and activation in bfloat16: half the bytes and float32's range."""

    source: ClassVar[str] = "Kalamkar et al. 2019, arXiv:1905.12322"
    dtype: ClassVar[str] = "bfloat16"
