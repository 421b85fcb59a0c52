"""4-bit codes of weights in blocks, the same in PyTorch and in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""The default number of neighbours that share a scale."""
LOWEST, HIGHEST = -8, 7
"""The smallest and the largest code."""


def quantize_blockwise(weight: Tensor, size: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantizes a matrix to codes -8 … 7, with a scale for each block of `size` neighbours in a row: `w ≈ scale q`.

    The scale is `m / -8`, where `m` is the block's value with the largest magnitude, with its sign. So `m` gets the
    code -8, whose magnitude is larger than that of 7, and is stored exactly. Zeros stay zeros. An outlier makes only
    the steps of its own block larger. Quantizing twice gives the same as once. ONNX Runtime's quantizer gives the same
    bits.

    Args:
        weight: Floats `(rows, columns)`; a shorter last block is filled up with zeros.
        size: The size of a block.

    Returns:
        The codes, int8 `(rows, columns)`, and the scales `(rows, blocks)`; the scale of a block of zeros is 0.
    """
    from torch.nn.functional import pad

    rows, columns = weight.shape
    blocks = pad(weight.detach(), (0, -columns % size)).reshape(rows, -1, size)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    scales = high.where(high.abs() > low.abs(), low) / LOWEST
    steps = (1 / scales).nan_to_num(posinf=0, neginf=0)
    # Halves are rounded up for both signs: the kernel adds 8 before it rounds halves away from zero.
    codes = (blocks * steps + 0.5 - LOWEST).floor().add(LOWEST).clamp(LOWEST, HIGHEST)
    return codes.reshape(rows, -1)[:, :columns].char(), scales.squeeze(-1)


def fake_quantize_blockwise(weight: Tensor, size: int = BLOCK) -> Tensor:
    """Quantizes and dequantizes a matrix `(rows, columns)`; see `quantize_blockwise`."""
    codes, scales = quantize_blockwise(weight, size)
    return codes * scales.repeat_interleave(size, -1)[:, : weight.shape[1]]
