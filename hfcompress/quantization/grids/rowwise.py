"""Codes of embedding tables, row by row, the same in PyTorch and in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hfcompress.quantization.grids.blockwise import fake_quantize_blockwise, quantize_blockwise
from hfcompress.quantization.grids.ranges import weight_scales

if TYPE_CHECKING:
    from torch import Tensor


def quantize_rowwise(table: Tensor, bits: Literal[8, 4]) -> tuple[Tensor, Tensor]:
    """Quantizes a table row by row: `w ≈ scale q`.

    At 8 bits each row has the scale `max |w| / 127`; at 4 bits each block of 32 neighbours in a row has its own, see
    `quantize_blockwise`. Zeros stay zeros. An outlier makes only the steps of its own row (block) larger.

    Args:
        table: Floats `(rows, width)`.
        bits: Bits of a weight.

    Returns:
        The codes, int8 `(rows, width)`, and the scales `(rows, blocks)`; at 8 bits a row is one block.
    """
    if bits == 4:
        return quantize_blockwise(table)
    scales = weight_scales(table).unsqueeze(-1)
    return (table.detach() / scales).round().char(), scales


def fake_quantize_rowwise(table: Tensor, bits: Literal[8, 4]) -> Tensor:
    """Quantizes and dequantizes a table `(rows, width)`; see `quantize_rowwise`."""
    if bits == 4:
        return fake_quantize_blockwise(table)
    codes, scales = quantize_rowwise(table, bits)
    return codes * scales
