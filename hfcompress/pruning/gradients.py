"""Gradients of the loss by gates that are all 1, each row's for itself, from one forward and backward pass a batch.

The gradient by a gate ξ that multiplies a unit's output x is `∂L/∂ξ = Σ_tokens x ∂L/∂x` at ξ = 1. It is read off the
backward pass where that passes by; the gates themselves, and the tensors that they would make, are not needed. No
weight has to have a gradient for it, and nothing below the first unit is passed through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze
from hfcompress.models.linears import layer_linears

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from hfcompress.utils.distributed import AllReduce

Batches = Iterable[Mapping[str, "Tensor"]]
Loss = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""`(logits, labels, mask)` to the mean loss over the rows."""
Of = Callable[["Tensor"], "Tensor"]
"""What is taken of each row's (or, of weights, each batch's) gradient before the mean."""


def unit_gradients(model: nn.Module, batches: Batches, loss: Loss) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """For each batch, each row's `∂L/∂ξ` by the gates on heads and neurons.

    The model is in eval mode and its weights are frozen while the iteration lasts; then it is as it was.

    Args:
        model: A model with its head.
        batches: Encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.

    Yields:
        One tensor for each layer's weights, `(batch, head groups)`, and one for each, `(batch, ffn)`; where a layer
        runs again and again, the sum over its runs.
    """
    modules, counts = spec_of(model).modules, unit_counts(model)
    places = [
        [layer.get_submodule(path) for layer in layers_of(model)]
        for path in (modules.attention_output, modules.ffn_out)
    ]
    with freeze(model):
        for batch in batches:
            found = [[_zeros(model, len(batch["labels"]), n) for n in units] for units in counts]
            handles = [
                module.register_forward_pre_hook(partial(_watch_input, sums))
                for modules, units in zip(places, found, strict=True)
                for module, sums in zip(modules, units, strict=True)
            ]
            _summed_loss(model, batch, loss, handles).backward()
            yield found[0], found[1]


def stream_gradients(model: nn.Module, batches: Batches, loss: Loss) -> Iterator[Tensor]:
    """For each batch, each row's `∂L/∂ζ` by the gates on the dimensions of the residual stream, `(batch, hidden)`.

    Dimensions meet only in the linear modules that read the stream (and in the statistics of norms). So `ζ_d`
    multiplies dimension `d` at every read: of queries, keys and values, of the FFN, and of what follows the last
    layer. Gated by 0 there, a dimension is gone up to those statistics. Its gradient is the sum over the reads of
    `Σ_tokens x_d ∂L/∂x_d`, the derivative taken through that read alone.

    Args:
        model: A model with its head; in eval mode and frozen while the iteration lasts, then as it was.
        batches: Encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.
    """
    modules = spec_of(model).modules
    stack = layers_of(model)
    writers = {id(layer.get_submodule(path)) for layer in stack for path in (modules.attention_output, modules.ffn_out)}
    readers = [module for module in layer_linears(model).values() if id(module) not in writers]
    with freeze(model):
        for batch in batches:
            sums = _zeros(model, len(batch["labels"]), _width(model))
            last: list[Tensor] = []
            handles = [module.register_forward_pre_hook(partial(_watch_read, sums)) for module in readers]
            handles += [layer.register_forward_pre_hook(_enter) for layer in stack]
            handles += [layer.register_forward_hook(partial(_remember, last)) for layer in stack]
            value = _summed_loss(model, batch, loss, handles)
            _watch(sums, last[-1])
            value.backward()
            yield sums


def mean_unit_gradients(
    model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, of: Of
) -> tuple[list[Tensor], list[Tensor]]:
    """The mean of `of(∂L/∂ξ)` over the rows of all processes: `(head groups,)` and `(ffn,)` for each layer's weights.

    Args:
        model: A model with its head; left as it was.
        batches: This process's encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows.
        all_reduce_sum: Sums tensors over the processes, in place.
        of: What is taken of each row's gradient, element by element.
    """
    heads, neurons = unit_counts(model)
    rows = ([*h, *n] for h, n in unit_gradients(model, batches, loss))
    means = _mean_over_rows(model, rows, [*heads, *neurons], all_reduce_sum, of)
    return means[: len(heads)], means[len(heads) :]


def mean_stream_gradients(model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, of: Of) -> Tensor:
    """The mean of `of(∂L/∂ζ)` over the rows of all processes, `(hidden,)`; arguments as of `mean_unit_gradients`."""
    rows = ([gradient] for gradient in stream_gradients(model, batches, loss))
    return _mean_over_rows(model, rows, [_width(model)], all_reduce_sum, of)[0]


def mean_weight_gradients(
    model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, of: Of
) -> dict[str, Tensor]:
    """The mean of `of(∂L/∂w)` over the batches of all processes, for the weights of the layers' linear modules.

    A gradient for each row and each weight is more than can be afforded: `L` is the mean over a batch, and batches
    count by their rows.

    Args:
        model: A model with its head; left as it was.
        batches: This process's encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows.
        all_reduce_sum: Sums tensors over the processes, in place.
        of: What is taken of each batch's gradient, element by element.

    Returns:
        By the weight's name in the state dict, and of its shape.
    """
    import torch

    weights = {f"{name}.weight": module.weight for name, module in layer_linears(model).items()}
    sums = [torch.zeros_like(weight, dtype=torch.float64, requires_grad=False) for weight in weights.values()]
    rows = 0
    with freeze(model, weights.values()):
        for batch in batches:
            count = len(batch["labels"])
            with torch.enable_grad():
                value = _mean_loss(model, batch, loss)
            # An attention without heads does not use its empty weights.
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
            for weight_sum, gradient in zip(sums, gradients, strict=True):
                weight_sum.add_(of(gradient.float()), alpha=count)
            rows += count
    return dict(zip(weights, _means(sums, rows, all_reduce_sum), strict=True))


def _mean_over_rows(
    model: nn.Module, batches: Iterable[list[Tensor]], sizes: list[int], all_reduce_sum: AllReduce, of: Of
) -> list[Tensor]:
    import torch

    sums, rows = [_zeros(model, size).double() for size in sizes], 0
    for gradients in batches:
        for value, gradient in zip(sums, gradients, strict=True):
            value += of(gradient).sum(0, dtype=torch.float64)
        rows += len(gradients[0])
    return _means(sums, rows, all_reduce_sum)


def _means(sums: list[Tensor], rows: int, all_reduce_sum: AllReduce) -> list[Tensor]:
    """In float64 until here, so that any number of processes comes to the same float32."""
    import torch

    count = torch.tensor([float(rows)], dtype=torch.float64, device=sums[0].device)
    all_reduce_sum([*sums, count])
    return [(value / count.clamp(min=1)).float() for value in sums]


def _width(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.hidden_size)


def _zeros(model: nn.Module, *shape: int) -> Tensor:
    import torch

    return torch.zeros(shape, device=_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _mean_loss(model: nn.Module, batch: Mapping[str, Tensor], loss: Loss) -> Tensor:
    inputs = {name: value.to(_device(model)) for name, value in batch.items()}
    labels = inputs.pop("labels")
    return loss(observe(model, inputs).logits, labels, inputs["attention_mask"].bool())


def _summed_loss(model: nn.Module, batch: Mapping[str, Tensor], loss: Loss, handles: list[Any]) -> Tensor:
    """The sum of the loss over the rows; the hooks are there in this forward pass alone."""
    import torch

    try:
        with torch.enable_grad():
            return _mean_loss(model, batch, loss) * len(batch["labels"])
    finally:
        for handle in handles:
            handle.remove()


def _watch_input(sums: Tensor, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums what the gradient of a module's input says of each unit, once it comes by."""
    if sums.shape[-1] == 0:
        return args
    # The first unit of all has no trainable weight below it: the graph begins here.
    x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
    _watch(sums, x)
    return (x, *args[1:])


def _watch_read(sums: Tensor, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same, of what a module reads from the stream, and through this module alone.

    What needs no gradient is not the stream: DeBERTa sends its relative positions through the same modules.
    """
    if not args[0].requires_grad:
        return args
    x = args[0].view_as(args[0])
    _watch(sums, x)
    return (x, *args[1:])


def _enter(_layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The graph begins at the first layer."""
    return args if args[0].requires_grad else (args[0].detach().requires_grad_(), *args[1:])


def _remember(last: list[Tensor], _layer: Any, _args: Any, output: Any) -> None:
    last[:] = [output[0] if isinstance(output, tuple) else output]


def _watch(sums: Tensor, x: Tensor) -> None:
    # Detached, or the tensor would hold its hook and the hook the tensor.
    x.register_hook(partial(_add, sums, x.detach()))


def _add(sums: Tensor, x: Tensor, gradient: Tensor) -> None:
    sums += (x.float() * gradient.float()).sum(1).unflatten(-1, (sums.shape[-1], -1)).sum(-1)
