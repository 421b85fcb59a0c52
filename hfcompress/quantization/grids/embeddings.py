"""The grid that an embedding table lies on once it is quantized, the same in torch and in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hfcompress.quantization.grids.blocks import block_codes, rounded_blocks
from hfcompress.quantization.grids.ranges import weight_steps

if TYPE_CHECKING:
    from torch import Tensor


def row_codes(table: Tensor, bits: Literal[8, 4]) -> tuple[Tensor, Tensor]:
    """A table's whole numbers and their scales.

    At 8 bits each row has the scale `max |w| / 127`; at 4 bits each block of 32 neighbours in a row has its own, see
    `block_codes`. Zeros stay zeros. An outlier costs its own row (block) the resolution and no other.

    Args:
        table: Floats `(rows, width)`.
        bits: Of a weight.

    Returns:
        `int8` numbers `(rows, width)`, and scales `(rows, blocks)`: at 8 bits one a row.
    """
    if bits == 4:
        return block_codes(table)
    steps = weight_steps(table).unsqueeze(-1)
    return (table.detach() / steps).round().char(), steps


def rounded_rows(table: Tensor, bits: Literal[8, 4]) -> Tensor:
    """A table `(rows, width)` as it is stored, made floats again; see `row_codes`."""
    if bits == 4:
        return rounded_blocks(table)
    codes, steps = row_codes(table, bits)
    return codes * steps
