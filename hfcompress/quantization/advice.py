"""Advice about the speed of backends, and the machines that it is for.

Advice forbids nothing. A sentence gives a measurement and its kind of machine, or says that nothing was measured. The
figures are ratios of medians of interleaved runs (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfcompress.measure.hardware import Abilities


@dataclass(frozen=True)
class Note:
    """A sentence about a backend on some machines.

    Attributes:
        holds: True for a machine that the sentence is about.
        sentence: The sentence: what is slow or inaccurate there.
    """

    holds: Callable[[Abilities], bool]
    sentence: str


OLDER = "than PyTorch in float32 on a processor with AVX2 alone (BERT's width, 2 threads)"
NEWER = "than PyTorch in float32 on a processor with AVX-512 and VNNI (MiniLM-L6, 2 threads, batch 1 and 32)"


def has_only_avx2(machine: Abilities) -> bool:
    """True for an x86 processor with AVX2 and without AVX-512."""
    return machine.has("avx2") and not machine.has("avx512f")


def has_avx512(machine: Abilities) -> bool:
    """True for an x86 processor with AVX-512."""
    return machine.has("avx512f")


def lacks_vnni(machine: Abilities) -> bool:
    """True for an x86 processor without VNNI: it adds int8 products in 16 bits, which can overflow."""
    return machine.has("avx2") and not machine.has("avx512_vnni", "avx_vnni")


def lacks_bfloat16(machine: Abilities) -> bool:
    """True for a processor that is known to have no instructions for bfloat16."""
    return bool(machine.flags) and not machine.has("avx512_bf16", "amx_bf16", "bf16")


def lacks_tensor_cores(kind: str) -> Note:
    """Makes the note about GPUs whose tensor cores cannot multiply a type."""
    return Note(
        lambda machine: any(kind not in gpu.multiplies for gpu in machine.gpus),
        f"this GPU has no tensor cores for {kind}; not measured",
    )


UNMEASURED_ARM = Note(lambda machine: machine.has("asimddp", "i8mm"), "its speed was not measured on ARM")
UNMEASURED_PROCESSOR = Note(
    lambda machine: not machine.flags,
    "its speed was not measured on this processor: slower than float32 on some, without a gain on others",
)
UNMEASURED_GPU = Note(lambda machine: bool(machine.gpus), "its speed was not measured on a GPU")
