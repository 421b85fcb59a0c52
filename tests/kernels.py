"""Another processor's kernels, simulated: the same operations, rounded differently.

A kernel is free in the order in which it adds, so two processors agree on a float only up to rounding. Tests that pass
on one of them by luck (ties, equality across kernels) fail under `OtherKernels`, which moves the results of such
operations by a unit in the last place, up or down by their position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ADDING = frozenset([
    "_linalg_eigh", "_linalg_solve_ex", "_linalg_svd", "_log_softmax", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "addmm", "baddbmm", "bmm", "cholesky_inverse", "cos",
    "cumsum", "dot", "erf", "exp", "gelu", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_lstsq",
    "linalg_solve_triangular", "linalg_triangular_solve", "linalg_vector_norm", "mean", "mm", "mse_loss", "mv",
    "native_layer_norm", "nll_loss_forward", "rsqrt", "silu", "sin", "sqrt", "sum", "tanh", "var", "var_mean",
])  # fmt: skip
"""Operations whose results depend on the order of additions, or on an approximation of a function.

Not `log`: MPNet's buckets of distances are whole numbers of exact logarithms, and no processor moves those.
"""
ONE_TERM = {"aten::sum", "aten::mean", "aten::cumsum"}
"""Of them, those that are exact where nothing is added: a sum over a dimension of width one."""


class OtherKernels(TorchDispatchMode):
    """While it is active, results of `ADDING` are multiplied by `1 ± ε`, alternating along the flattened tensor.

    Equal calls give equal results, as on any processor. Values that are exact in any order of additions (integers,
    zeros) stay, so that what is exact for a reason is not blamed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") not in ADDING or func._schema.is_mutable:
            return found
        if isinstance(found, torch.Tensor):
            return found if func._schema.name in ONE_TERM and found.numel() == args[0].numel() else _moved(found)
        return (
            type(found)(_moved(x) if isinstance(x, torch.Tensor) else x for x in found)
            if isinstance(found, tuple | list)
            else found
        )


def _moved(values: torch.Tensor) -> torch.Tensor:
    if not values.is_floating_point() or values.numel() == 0:
        return values
    sign = torch.ones(values.numel(), dtype=values.dtype, device=values.device)
    sign[1::2] = -1
    moved = values * (1 + sign.reshape(values.shape) * torch.finfo(values.dtype).eps)
    return torch.where(values == values.round(), values, moved)


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rounds as `OtherKernels` does, except while a graph is written: the exporter calls operations in its own way."""
    export = torch.onnx.export

    def plainly(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return export(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", plainly)
    with OtherKernels():
        yield
