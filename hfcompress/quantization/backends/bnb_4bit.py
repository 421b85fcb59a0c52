"""4-bit NormalFloat through bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.linears import planned_linears
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.bnb_8bit import Bnb8Bit
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

INPUTS, OUTPUTS = 64, 32
"""What must divide the widths of 4-bit layers on a CPU with AVX512-BF16, where they are packed in such blocks."""


class Bnb4Bit(Bnb8Bit):
    """4-bit linear layers in blocks of 64 with a scale each; saves memory, not time. Pooler and classifier stay.

    Embeddings stay in float32, and a block is always of 64 weights: transformers offers no other choice. On a CPU with
    AVX512-BF16 products are computed in bfloat16, whatever `compute_dtype` says.
    """

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

    def problems(self, shape: Shape) -> list[str]:
        if not shape.even:
            return []  # which widths there will be is not known; `require_runnable` sees them
        for number, layer in enumerate(shape.layers):
            for path, inputs, outputs in planned_linears(shape, layer):
                place = f"{ARCHITECTURES[shape.architecture].modules.layers}.{number}.{path}"
                left = any(f".{name}." in f".{place}." for name in self.skip or [])
                if _unblocked(inputs, outputs) and not left and not _gpu():
                    return [f"{_refusal(place, inputs, outputs)}: {REPAIR}"]
        return []

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

    def rounded(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=self.double_quant, quant_type=self.quant_type
        )
        return dequantize_4bit(packed, state)

    def require_runnable(self, model: Any) -> None:
        """Passes where this machine's kernels can run the quantized layers.

        Raises:
            HfcompressError: for widths that bitsandbytes' CPU kernels cannot block; those of a GPU can.
        """
        from bitsandbytes.nn import Linear4bit

        if model.device.type != "cpu":
            return
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit) and _unblocked(layer.in_features, layer.out_features):
                raise HfcompressError(_refusal(name, layer.in_features, layer.out_features), REPAIR)


REPAIR = "make the widths multiples of 64, name the layer in `skip`, quantize on a GPU, or use bnb_8bit"


def _unblocked(inputs: int, outputs: int) -> bool:
    return inputs % INPUTS > 0 or outputs % OUTPUTS > 0


def _refusal(name: str, inputs: int, outputs: int) -> str:
    return (
        f"{name} has {inputs} inputs and {outputs} outputs; on a CPU bitsandbytes multiplies 4-bit layers in blocks of "
        f"{INPUTS} inputs and {OUTPUTS} outputs"
    )


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
