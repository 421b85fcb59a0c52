"""Calibration: finds the ranges of the inputs of linear layers over rows of text without padding.

ONNX Runtime's calibrators were tried and not chosen. They read the tensors of a graph, so padding counts in the ranges.
These functions read the model's layers without padding, and give a graph and quantization-aware training the same
ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.models.forward import select_inputs
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

Method = Literal["minmax", "percentile", "entropy"]
BINS = 2048
"""The number of bins of a histogram."""
COARSE = 128
"""The number of positive levels of an 8-bit grid, which `entropy` compares the histogram with."""


def calibrate(
    model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]], method: Method, percentile: float = 99.99
) -> Ranges:
    """Finds the range of each linear layer's input, by the layer's path in the model; a range includes 0.

    In an input `(batch, length, width)`, the positions with an `attention_mask` of 1 count; any other input, such as a
    pooler's `(batch, width)`, counts completely. A layer that never runs has no range.

    - `minmax`: from the smallest to the largest value.
    - `percentile`: the middle `percentile` percent of the values; half of the others are clipped at either end.
    - `entropy`: clips the absolute values at the threshold with the smallest Kullback-Leibler divergence between their
      histogram of 2048 bins and the same in 128 levels (Migacz, "8-bit inference with TensorRT", GTC 2017, pages 26
      to 38).

    Args:
        model: A model in eval mode, on any device.
        batches: Token arrays with their `attention_mask`; all methods but `minmax` read them twice.
        method: The method.
        percentile: The percentage for `percentile`.

    Raises:
        HfcompressError: if an input is not finite, or if there are no batches.
    """
    batches = list(batches)
    extremes = find_extremes(model, batches)
    if method == "minmax":
        return Ranges(extremes)
    folded = method == "entropy"
    bounds = {path: (0.0, max(-low, high)) if folded else (low, high) for path, (low, high) in extremes.items()}
    counts = count_histograms(model, batches, bounds, folded)
    inputs = {}
    for path, (low, high) in extremes.items():
        if low == high:  # an input of zeros
            inputs[path] = (low, high)
        elif folded:
            threshold = find_least_divergent(counts[path]) / BINS * bounds[path][1]
            inputs[path] = (max(low, -threshold), min(high, threshold))
        else:
            first, last = find_middle(counts[path], percentile)
            width = (high - low) / BINS
            inputs[path] = (min(low + first * width, 0.0), max(low + last * width, 0.0))
    return Ranges(inputs)


def find_extremes(
    model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, tuple[float, float]]:
    """Finds the smallest and the largest value of each layer's input, and 0 between them."""
    import math

    found: dict[str, tuple[float, float]] = {}

    def see(path: str, values: Tensor) -> None:
        low, high = (float(value) for value in values.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise HfcompressError(
                f"the input of {path} is not finite: a layer before it overflows or has NaN weights",
                "train or convert the model again; a float16 checkpoint may have overflowed",
            )
        before = found.get(path, (0.0, 0.0))
        found[path] = min(before[0], low), max(before[1], high)

    for_each_input(model, batches, see)
    if not found:
        raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
    return found


def count_histograms(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    bounds: Mapping[str, tuple[float, float]],
    folded: bool,
) -> dict[str, NDArray[Any]]:
    """Counts the values in 2048 bins, by path; absolute values if `folded`."""
    import numpy as np

    found: dict[str, NDArray[Any]] = {path: np.zeros(BINS) for path in bounds}

    def see(path: str, values: Tensor) -> None:
        low, high = bounds[path]
        if low < high:
            found[path] += (values.abs() if folded else values).float().histc(BINS, low, high).cpu().numpy()

    for_each_input(model, batches, see)
    return found


def for_each_input(
    model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]], see: Callable[[str, Tensor], None]
) -> None:
    """Calls `see` with each linear layer's path and its input, without padding."""
    import torch
    from torch import nn

    mask: Tensor

    def hook(path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach()
        see(path, values[mask] if values.dim() == 3 and values.shape[:2] == mask.shape else values)

    handles = [
        module.register_forward_pre_hook(partial(hook, path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            for batch in batches:
                tensors = {name: torch.from_numpy(value).to(model.device) for name, value in batch.items()}
                mask = tensors["attention_mask"].bool()
                model(**select_inputs(model, tensors))
    finally:
        for handle in handles:
            handle.remove()


def find_middle(counts: NDArray[Any], percentile: float) -> tuple[int, int]:
    """Finds the first and the last bin edge of the middle percentage, with the bins of both ends included."""
    import numpy as np

    tail = counts.sum() * (1 - percentile / 100) / 2
    below = counts.cumsum()
    return int(np.searchsorted(below, tail, side="right")), int(np.searchsorted(below, below[-1] - tail)) + 1


def find_least_divergent(counts: NDArray[Any]) -> int:
    """Finds the number of bins to keep, at least 128; values beyond them count in the last one."""
    import numpy as np

    best, chosen = float("inf"), BINS
    for kept in range(COARSE, BINS + 1):
        inside = counts[:kept]
        if not inside[-1]:  # the divergence from an empty level is infinite
            continue
        expected = inside.copy()
        expected[-1] += counts[kept:].sum()
        starts = np.arange(COARSE) * kept // COARSE
        filled = np.maximum(np.add.reduceat((inside > 0).astype(np.int64), starts), 1)
        level = np.add.reduceat(inside, starts) / filled
        coarse = np.repeat(level, np.diff(starts, append=kept))
        seen = expected > 0
        p, q = expected[seen] / expected.sum(), coarse[seen] / inside.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, chosen = divergence, kept
    return chosen


def iterate_rows(batches: Iterable[Mapping[str, NDArray[Any]]], names: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields each row alone as the inputs `(1, length)` of a graph, without padding, which would count in the ranges.

    Args:
        batches: Token arrays with their `attention_mask`.
        names: The names of the graph's inputs; token types are zeros if the tokenizer gives none.
    """
    import numpy as np

    for batch in batches:
        zeros = np.zeros_like(batch["input_ids"])
        for row, mask in enumerate(batch["attention_mask"].astype(bool)):
            yield {name: batch.get(name, zeros)[row : row + 1, mask] for name in names}
