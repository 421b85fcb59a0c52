"""Computes per-row gradients of the loss by gates of value 1, in one forward and backward pass for each batch.

The gradient by a gate ξ that multiplies a unit's output x is `∂L/∂ξ = Σ_tokens x ∂L/∂x` at ξ = 1. Hooks compute it
during the backward pass, so gates and their tensors do not exist. No weight needs a gradient, and the backward pass
ends at the first unit.
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
Transform = Callable[["Tensor"], "Tensor"]
"""Transforms each row's gradient (for weights, each batch's) before the mean, element by element."""


def unit_gradients(model: nn.Module, batches: Batches, loss: Loss) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Computes each row's gradients `∂L/∂ξ` by the gates on heads and neurons, batch by batch.

    The model is in eval mode and frozen during the iteration, and is restored afterwards.

    Args:
        model: A model with its task head.
        batches: Encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows, `mask` true at real tokens.

    Yields:
        For each layer's weights one tensor `(batch, head groups)`, and for each one tensor `(batch, ffn)`; if layers
        share their weights, the sum over them.
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
    """Computes each row's gradients `∂L/∂ζ` by the gates on hidden dimensions, `(batch, hidden)`, batch by batch.

    Dimensions mix only in the linear modules that read the residual stream (and in the statistics of norms). So `ζ_d`
    multiplies dimension `d` wherever the stream is read: by queries, keys and values, by the FFN, and by the modules
    after the last layer. A gate of 0 removes the dimension, except from those statistics. Its gradient is the sum over
    the reads of `Σ_tokens x_d ∂L/∂x_d`, with the derivative through that read alone.

    Args:
        model: A model with its task head; in eval mode and frozen during the iteration, restored afterwards.
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
    model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, transform: Transform
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes the mean of `transform(∂L/∂ξ)` over the rows of all processes.

    Args:
        model: A model with its task head; left as it was.
        batches: This process's encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows.
        all_reduce_sum: Sums tensors over the processes, in place.
        transform: Transforms each row's gradient before the mean, element by element.

    Returns:
        For each layer's weights one tensor `(head groups,)`, and for each one tensor `(ffn,)`.
    """
    heads, neurons = unit_counts(model)
    rows = ([*h, *n] for h, n in unit_gradients(model, batches, loss))
    means = _mean_over_rows(model, rows, [*heads, *neurons], all_reduce_sum, transform)
    return means[: len(heads)], means[len(heads) :]


def mean_stream_gradients(
    model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, transform: Transform
) -> Tensor:
    """Computes the mean of `transform(∂L/∂ζ)` over the rows of all processes: `(hidden,)`."""
    rows = ([gradient] for gradient in stream_gradients(model, batches, loss))
    return _mean_over_rows(model, rows, [_width(model)], all_reduce_sum, transform)[0]


def mean_weight_gradients(
    model: nn.Module, batches: Batches, loss: Loss, all_reduce_sum: AllReduce, transform: Transform
) -> dict[str, Tensor]:
    """Computes the mean of `transform(∂L/∂w)` over the batches of all processes, for the layers' linear weights.

    A gradient for each row and each weight would be too expensive: `L` is the mean over a batch, and batches count by
    their rows.

    Args:
        model: A model with its task head; left as it was.
        batches: This process's encoded batches with labels.
        loss: `(logits, labels, mask)` to the mean loss over rows.
        all_reduce_sum: Sums tensors over the processes, in place.
        transform: Transforms each batch's gradient before the mean, element by element.

    Returns:
        For each weight's name in the state dict, a tensor of its shape.
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
            # Attention without heads does not use its empty weights.
            gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True, materialize_grads=True)
            for weight_sum, gradient in zip(sums, gradients, strict=True):
                weight_sum.add_(transform(gradient.float()), alpha=count)
            rows += count
    return dict(zip(weights, _means(sums, rows, all_reduce_sum), strict=True))


def _mean_over_rows(
    model: nn.Module, batches: Iterable[list[Tensor]], sizes: list[int], all_reduce_sum: AllReduce, transform: Transform
) -> list[Tensor]:
    import torch

    sums, rows = [_zeros(model, size).double() for size in sizes], 0
    for gradients in batches:
        for value, gradient in zip(sums, gradients, strict=True):
            value += transform(gradient).sum(0, dtype=torch.float64)
        rows += len(gradients[0])
    return _means(sums, rows, all_reduce_sum)


def _means(sums: list[Tensor], rows: int, all_reduce_sum: AllReduce) -> list[Tensor]:
    """Divides sums by the rows of all processes; they are float64, so that the float32 does not depend on processes."""
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
    """Computes the sum of the loss over the rows, and then removes the hooks."""
    import torch

    try:
        with torch.enable_grad():
            return _mean_loss(model, batch, loss) * len(batch["labels"])
    finally:
        for handle in handles:
            handle.remove()


def _watch_input(sums: Tensor, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Adds the gradients of the units that a module reads to `sums`, during the backward pass."""
    if sums.shape[-1] == 0:
        return args
    # The first unit of all has no trainable weight below it: the graph starts here.
    x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
    _watch(sums, x)
    return (x, *args[1:])


def _watch_read(sums: Tensor, _module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Adds the gradients of the hidden dimensions that a module reads to `sums`, through this module alone.

    An input without gradient is not the residual stream: DeBERTa sends its relative positions through the same modules.
    """
    if not args[0].requires_grad:
        return args
    x = args[0].view_as(args[0])
    _watch(sums, x)
    return (x, *args[1:])


def _enter(_layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Starts the graph at the first layer."""
    return args if args[0].requires_grad else (args[0].detach().requires_grad_(), *args[1:])


def _remember(last: list[Tensor], _layer: Any, _args: Any, output: Any) -> None:
    last[:] = [output[0] if isinstance(output, tuple) else output]


def _watch(sums: Tensor, x: Tensor) -> None:
    # Detached: else tensor and hook would keep each other alive.
    x.register_hook(partial(_add, sums, x.detach()))


def _add(sums: Tensor, x: Tensor, gradient: Tensor) -> None:
    sums += (x.float() * gradient.float()).sum(1).unflatten(-1, (sums.shape[-1], -1)).sum(-1)
