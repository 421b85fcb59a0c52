"""The 4-bit grid of weights in blocks, the same in torch and in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""How many neighbours share a scale where nothing else is said."""
LOWEST, HIGHEST = -8, 7


def block_codes(weight: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """A matrix's whole numbers -8 … 7 and a scale for each block of `size` neighbours in a row: `w ≈ scale q`.

    The scale is `m / -8`, with `m` the block's value of the largest magnitude, sign included: -8 reaches further than
    7 does, and so `m` is stored exactly. Zeros stay zeros. An outlier costs its own block the resolution and no other.
    What was rounded once is rounded to itself. ONNX Runtime's quantizer gives the same bits.

    Args:
        weight: Floats `(rows, columns)`; a shorter last block is filled up with zeros.
        size: Of a block.

    Returns:
        `int8` numbers `(rows, columns)` and scales `(rows, blocks)`; that of a block of zeros is 0.
    """
    from torch.nn.functional import pad

    rows, columns = weight.shape
    blocks = pad(weight.detach(), (0, -columns % size)).reshape(rows, -1, size)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scales = high.where(high.abs() > low.abs(), low) / LOWEST
    steps = (1 / scales).nan_to_num(posinf=0, neginf=0)
    # Halves go up, whatever the sign: the kernel rounds them away from zero once 8 is added.
    codes = (blocks * steps + 0.5 - LOWEST).floor().add(LOWEST).clamp(LOWEST, HIGHEST)
    return codes.reshape(rows, -1)[:, :columns].char(), scales.squeeze(-1)


def rounded_blocks(weight: Tensor, size: int = BLOCK) -> Tensor:
    """A matrix `(rows, columns)` as it is stored, made floats again; see `block_codes`."""
    codes, scales = block_codes(weight, size)
    return codes * scales.repeat_interleave(size, -1)[:, : weight.shape[1]]
