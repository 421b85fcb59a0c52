"""Gates on hidden dimensions: the reference that cutting them is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from hfcompress.pruning.hidden_dimensions import kept_indices


@contextmanager
def apply_hidden_gates(model: Any, dims: Sequence[int]) -> Iterator[None]:
    """Makes a model answer inside the context as `cut_hidden` with the same arguments would.

    Modules that read the residual stream see zeros in place of the other dimensions, and norms are taken over those
    that stay.
    """
    handles = []
    try:
        for (name, axis), index in kept_indices(model, dims).items():
            path, _, own = name.rpartition(".")
            module: Any = model.get_submodule(path)
            if own != "weight":
                continue
            if axis == 1 and isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(partial(_masked, index)))
            elif module.weight.dim() == 1:
                norm = _Norm(index, module)
                handles.append(module.register_forward_pre_hook(norm.before))
                handles.append(module.register_forward_hook(norm.after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(index: Tensor, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[-1]).index_fill(0, index.to(like.device), 1.0)


def _masked(index: Tensor, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * _mask(index, inputs[0]), *inputs[1:])


@dataclass(frozen=True)
class _Norm:
    """Makes a norm over all dimensions one over `index`.

    Where the others are zero and these are centred, the mean square over all N is k/N of that over the k that stay;
    scaling the input by √(N/k) corrects it, so that the module's own epsilon counts as it does in the smaller norm.
    """

    index: Tensor
    module: nn.Module

    def before(self, _module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, mask = inputs[0], _mask(self.index, inputs[0])
        if isinstance(self.module, nn.LayerNorm):
            x = x - (x * mask).sum(-1, keepdim=True) / mask.sum()
        return (x * mask / self._scale(mask), *inputs[1:])

    def after(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        mask, bias = _mask(self.index, output), getattr(self.module, "bias", None)
        bias = 0 if bias is None else bias
        return ((output - bias) * self._scale(mask) + bias) * mask

    @staticmethod
    def _scale(mask: Tensor) -> Any:
        return (mask.sum() / mask.numel()) ** 0.5
