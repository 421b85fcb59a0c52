"""4-bit NormalFloat through bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from hfcompress.backends.bnb_8bit import Bnb8Bit
from hfcompress.base.errors import HfcompressError
from hfcompress.base.shape import Shape


class Bnb4Bit(Bnb8Bit):
    """4-bit linear layers in blocks of 64 with a scale each; saves memory, not time. Pooler and classifier stay."""

    source: ClassVar[str] = "QLoRA, Dettmers et al. 2023, arXiv:2305.14314"

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """nf4 suits normally distributed weights."""
    double_quant: bool = False
    """Quantize the block scales too."""
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the dequantized product is computed in; on a CPU float32 is the fastest."""

    def plan(self, shape: Shape) -> Shape:
        scales = 32 / 64 if not self.double_quant else 8 / 64
        return replace(shape, linear_bits=4 + scales)

    def options(self, skip: list[str]) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=skip,
        )

    def require_runnable(self, model: Any) -> None:
        """Passes where this machine's kernels can run the quantized layers.

        Raises:
            HfcompressError: for widths that bitsandbytes' CPU kernels cannot block; those of a GPU can.
        """
        from bitsandbytes.nn import Linear4bit

        if model.device.type != "cpu":
            return
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit) and (layer.in_features % 64 or layer.out_features % 32):
                raise HfcompressError(
                    f"{name} has {layer.in_features} inputs and {layer.out_features} outputs; on a CPU bitsandbytes "
                    "multiplies 4-bit layers in blocks of 64 inputs and 32 outputs",
                    "make the widths multiples of 64, name the layer in `skip`, quantize on a GPU, or use bnb_8bit",
                )
