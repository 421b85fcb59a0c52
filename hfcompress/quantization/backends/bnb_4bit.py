"""4-bit NormalFloat by bitsandbytes: the smallest weights for adapters (QLoRA); saves memory, not time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.linears import planned_linears
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import (
    OLDER,
    UNMEASURED_ARM,
    UNMEASURED_GPU,
    UNMEASURED_PROCESSOR,
    Note,
    has_only_avx2,
)
from hfcompress.quantization.backends.bnb_8bit import Bnb8Bit
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

INPUTS, OUTPUTS = 64, 32
"""The blocks in which a CPU with AVX512-BF16 packs 4-bit layers; they must divide the widths."""


class Bnb4Bit(Bnb8Bit):
    """Stores linear layers in blocks of 64 4-bit weights with a scale each; it saves memory, not time.

    Pooler, classifier and embeddings stay in float32. A block always has 64 weights, because transformers offers no
    other size. A CPU with AVX512-BF16 computes products in bfloat16, whatever `compute_dtype` says.
    """

    source: ClassVar[str] = "QLoRA, Dettmers et al. 2023, arXiv:2305.14314"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(
            has_only_avx2,
            f"measured 1.1 to 1.2 times slower {OLDER}, and 4 to 5 times with `compute_dtype: bfloat16`: it saves "
            "memory, not time",
        ),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        UNMEASURED_GPU,
    )

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type; nf4 suits normally distributed weights."""
    double_quant: bool = False
    """Quantize the scales of the blocks too."""
    compute_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The type that products are computed in; on a CPU float32 is the fastest."""

    def plan(self, shape: Shape) -> Shape:
        scales = 32 / 64 if not self.double_quant else 8 / 64
        return replace(shape, linear_bits=4 + scales)

    def problems(self, shape: Shape) -> list[str]:
        if not shape.even:
            return []  # the widths are not known yet; `require_runnable` checks them
        for number, layer in enumerate(shape.layers):
            for path, inputs, outputs in planned_linears(shape, layer):
                place = f"{ARCHITECTURES[shape.architecture].modules.layers}.{number}.{path}"
                left = any(f".{name}." in f".{place}." for name in self.skip or [])
                if _is_unaligned(inputs, outputs) and not left and not _gpu():
                    return [f"{_refusal(place, inputs, outputs)}: {FIX}"]
        return []

    def config(self, skip: list[str]) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            llm_int8_skip_modules=skip,
        )

    def fake_quantize(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=self.double_quant, quant_type=self.quant_type
        )
        return dequantize_4bit(packed, state)

    def require_runnable(self, model: Any) -> None:
        """Checks that this machine's kernels can run the quantized layers.

        Raises:
            HfcompressError: for widths that bitsandbytes' CPU kernels do not take; a GPU takes any.
        """
        from bitsandbytes.nn import Linear4bit

        if model.device.type != "cpu":
            return
        for name, layer in model.named_modules():
            if isinstance(layer, Linear4bit) and _is_unaligned(layer.in_features, layer.out_features):
                raise HfcompressError(_refusal(name, layer.in_features, layer.out_features), FIX)


FIX = "make the widths multiples of 64, name the layer in `skip`, quantize on a GPU, or use bnb_8bit"


def _is_unaligned(inputs: int, outputs: int) -> bool:
    return inputs % INPUTS > 0 or outputs % OUTPUTS > 0


def _refusal(name: str, inputs: int, outputs: int) -> str:
    return (
        f"{name} has {inputs} inputs and {outputs} outputs; on a CPU bitsandbytes multiplies 4-bit layers in blocks of "
        f"{INPUTS} inputs and {OUTPUTS} outputs"
    )


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
