"""Approximates the Hessian of the loss by the outputs of linear layers, from second moments of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hfcompress.utils.distributed import AllReduce


def output_hessian(
    model: nn.Module,
    modules: Sequence[nn.Linear],
    batches: Iterable[Mapping[str, Tensor]],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    all_reduce_sum: AllReduce,
) -> list[Tensor]:
    """Computes the mean over rows of `Σ_tokens g gᵀ`, `g` the gradient of a row's loss by a module's output at a token.

    Together with the second moment of the module's inputs it approximates the Hessian of the loss by the module's
    weights, if inputs and gradients are independent, and tokens too (Martens & Grosse 2015, arXiv:1503.05671, eq. 1).

    Args:
        model: A model with its task head; left as it was.
        modules: Linear layers of the model.
        batches: This process's encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows.
        all_reduce_sum: Sums tensors over the processes, in place.

    Returns:
        For each module `(outputs, outputs)`, in float64.
    """
    import torch

    device = next(model.parameters()).device
    sums = [torch.zeros((m.out_features,) * 2, dtype=torch.float64, device=device) for m in modules]
    rows = torch.zeros(1, dtype=torch.float64, device=device)
    with freeze(model), torch.enable_grad():
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            labels, mask = inputs.pop("labels"), inputs["attention_mask"].bool()
            handles = [m.register_forward_hook(partial(_watch, s)) for m, s in zip(modules, sums, strict=True)]
            try:
                logits = observe(model, inputs).logits
            finally:
                for handle in handles:
                    handle.remove()
            # The sum gives each row the gradient of its own loss: rows do not mix inside the model.
            (loss(logits, labels, mask) * len(labels)).backward()
            rows += len(labels)
    all_reduce_sum([*sums, rows])
    return [value / rows.clamp(min=1) for value in sums]


def _watch(moment: Tensor, _module: Any, _args: Any, output: Tensor) -> Tensor:
    # Nothing below the first of these modules needs a gradient: the graph starts here.
    output = output if output.requires_grad else output.detach().requires_grad_()
    output.register_hook(partial(_add, moment))
    return output


def _add(moment: Tensor, gradient: Tensor) -> None:
    # The gradient at padding is zero: no real token attends to it.
    flat = gradient.flatten(0, -2).float()
    moment += flat.T @ flat
