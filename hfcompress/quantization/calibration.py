"""The ranges of what the linear layers of a model read, over real rows and without their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.models.forward import accepted
from hfcompress.quantization.grids.ranges import Ranges
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

Method = Literal["minmax", "percentile", "entropy"]
BINS = 2048
"""Of a histogram."""
COARSE = 128
"""Levels of one sign of an 8-bit grid, that `entropy` holds the histogram against."""


def calibrate(
    model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]], method: Method, percentile: float = 99.99
) -> Ranges:
    """The range of each linear layer's input, by the layer's path in the model; 0 lies within.

    An input `(batch, length, width)` is judged where `attention_mask` is 1, and any other, such as a pooler's
    `(batch, width)`, as a whole. A layer that never runs is not in it.

    - `minmax`: all that was seen.
    - `percentile`: the middle `percentile` percent, half of the rest being clipped at either end.
    - `entropy`: of the thresholds that clip the absolute values, the one under which the histogram of 2048 bins loses
      least in Kullback-Leibler divergence when it is told in 128 levels (Migacz, "8-bit inference with TensorRT",
      GTC 2017, pages 26 to 38).

    Args:
        model: In eval mode, on any device.
        batches: Token arrays with their `attention_mask`; read twice by all methods but `minmax`.
        method: How the range is found.
        percentile: In percent, of `percentile`.

    Raises:
        HfcompressError: where an input is not finite, or there is no batch.
    """
    batches = list(batches)
    extremes = _extremes(model, batches)
    if method == "minmax":
        return Ranges(extremes)
    folded = method == "entropy"
    bounds = {path: (0.0, max(-low, high)) if folded else (low, high) for path, (low, high) in extremes.items()}
    counts = _histograms(model, batches, bounds, folded)
    inputs = {}
    for path, (low, high) in extremes.items():
        if low == high:  # an input of zeros
            inputs[path] = (low, high)
        elif folded:
            threshold = _least_divergent(counts[path]) / BINS * bounds[path][1]
            inputs[path] = (max(low, -threshold), min(high, threshold))
        else:
            first, last = _middle(counts[path], percentile)
            width = (high - low) / BINS
            inputs[path] = (min(low + first * width, 0.0), max(low + last * width, 0.0))
    return Ranges(inputs)


def _extremes(model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, tuple[float, float]]:
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

    _show(model, batches, see)
    if not found:
        raise HfcompressError("there are no rows to calibrate on", "give the task a train split")
    return found


def _histograms(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    bounds: Mapping[str, tuple[float, float]],
    folded: bool,
) -> dict[str, NDArray[Any]]:
    """Counts `(2048,)` by path, of absolute values where folded."""
    import numpy as np

    found: dict[str, NDArray[Any]] = {path: np.zeros(BINS) for path in bounds}

    def see(path: str, values: Tensor) -> None:
        low, high = bounds[path]
        if low < high:
            found[path] += (values.abs() if folded else values).float().histc(BINS, low, high).cpu().numpy()

    _show(model, batches, see)
    return found


def _show(
    model: PreTrainedModel, batches: Iterable[Mapping[str, NDArray[Any]]], see: Callable[[str, Tensor], None]
) -> None:
    """Calls `see` with a linear layer's path and what it reads, padding left out."""
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
                model(**accepted(model, tensors))
    finally:
        for handle in handles:
            handle.remove()


def _middle(counts: NDArray[Any], percentile: float) -> tuple[int, int]:
    """The edges, in bins, between which the middle lies: the bins that its two ends fall into are within."""
    import numpy as np

    tail = counts.sum() * (1 - percentile / 100) / 2
    below = counts.cumsum()
    return int(np.searchsorted(below, tail, side="right")), int(np.searchsorted(below, below[-1] - tail)) + 1


def _least_divergent(counts: NDArray[Any]) -> int:
    """The number of bins, of at least 128, that are kept; what lies beyond counts in the last of them."""
    import numpy as np

    best, chosen = float("inf"), BINS
    for kept in range(COARSE, BINS + 1):
        inside = counts[:kept]
        if not inside[-1]:  # the divergence from a level that is empty is infinite
            continue
        expected = inside.copy()
        expected[-1] += counts[kept:].sum()
        starts = np.arange(COARSE) * kept // COARSE
        filled = np.maximum(np.add.reduceat((inside > 0).astype(np.int64), starts), 1)
        level = np.add.reduceat(inside, starts) / filled
        told = np.repeat(level, np.diff(starts, append=kept))
        seen = expected > 0
        p, q = expected[seen] / expected.sum(), told[seen] / inside.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, chosen = divergence, kept
    return chosen
