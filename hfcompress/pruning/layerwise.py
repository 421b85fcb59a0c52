"""Runs a model one layer at a time, and keeps the hidden states of all batches in memory between layers.

A decision about a layer can then use the outputs of the layers before it after these were changed. All layers together
cost a few forward passes, instead of one forward pass for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import layers_of
from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze

if TYPE_CHECKING:
    from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a layer besides the hidden states: masks, positions."""


@dataclass
class LayerInputs:
    """The input of a layer for one batch.

    Attributes:
        hidden: The hidden states that go into the next layer, `(batch, length, hidden)`.
        real: True at real tokens, `(batch, length)`.
        calls: For each layer's weights, their calls: one, or several if layers share their weights.
    """

    hidden: Tensor
    real: Tensor
    calls: list[list[Call]]

    def tokens(self, values: Tensor) -> Tensor:
        """Selects values `(batch, length, width)` at the real tokens, `(tokens, width)`."""
        return values.flatten(0, 1) if self._full else values[self.real]

    @cached_property
    def _full(self) -> bool:
        return bool(self.real.all())


@dataclass
class LayerRun:
    """The tensors of one run of a layer.

    Attributes:
        hidden: The layer's input.
        inputs, outputs: Those of the watched modules, by path; the first call if a module is called several times.
        result: The layer's output; its input if the run was stopped.
    """

    hidden: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    result: Tensor = None  # type: ignore[assignment]


def capture_layer_inputs(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[LayerInputs]:
    """Runs the embeddings, and returns the input of the first layer for each batch."""
    import torch

    device, found, known = next(model.parameters()).device, [], list(batches)

    def show(batch: Mapping[str, Tensor], rows: int | None = None) -> dict[str, Tensor]:
        inputs = {name: value[:rows].to(device) for name, value in batch.items() if name != "labels"}
        observe(model, inputs)
        return inputs

    with torch.no_grad(), freeze(model), _hand_on(layers_of(model)) as stand_ins:
        for batch in known[:1]:
            show(batch, 1)  # each layer really runs the first time, so one row is enough
        for batch in known:
            for stand_in in stand_ins:
                stand_in.calls, stand_in.first = [], None
            inputs = show(batch)
            first, calls = stand_ins[0].first, [stand_in.calls for stand_in in stand_ins]
            assert first is not None
            found.append(LayerInputs(first, inputs["attention_mask"].bool(), calls))
    return found


def run_layer(
    model: nn.Module, index: int, rows: LayerInputs, watched: Sequence[str] = (), stop: str = ""
) -> Iterator[LayerRun]:
    """Runs a layer as often as the model does; each run gets the result of the one before.

    Args:
        model: A model in eval mode, with the embeddings that made `rows`.
        index: The number of the layer in the stack, from 0.
        rows: The layer's input for a batch; not changed.
        watched: Paths of modules of the layer, to record their inputs and outputs.
        stop: Path of a module; the last run ends before it, after its input is recorded.
    """
    import torch

    layer, calls, hidden = layers_of(model)[index], rows.calls[index], rows.hidden
    for number, (args, kwargs) in enumerate(calls, start=1):
        seen = LayerRun(hidden, result=hidden)
        with torch.no_grad(), _watch(layer, seen, {*watched, stop} - {""}, stop if number == len(calls) else ""):
            try:
                output = layer(hidden, *args, **kwargs)
                seen.result = hidden = output[0] if isinstance(output, tuple) else output
            except _Stopped:
                pass
        yield seen


class _Stopped(Exception):  # noqa: N818
    pass


@contextmanager
def _watch(layer: nn.Module, seen: LayerRun, paths: Iterable[str], stop: str) -> Iterator[None]:
    def before(path: str, _module: Any, args: tuple[Any, ...]) -> None:
        seen.inputs.setdefault(path, args[0])
        if path == stop:
            raise _Stopped

    def after(path: str, _module: Any, _args: Any, output: Any) -> None:
        seen.outputs.setdefault(path, output)

    handles = []
    try:
        for path in paths:
            module = layer.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(before, path)))
            handles.append(module.register_forward_hook(partial(after, path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _StandIn:
    """Stands in for a layer's forward: records its calls, and returns its input in the form of the layer's output."""

    def __init__(self, layer: nn.Module) -> None:
        self.inner = layer.forward
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        self.form: Any = None

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Otherwise a decoder's cache would grow with every run.
        kwargs = {name: None if name == "past_key_values" else value for name, value in kwargs.items()}
        self.calls.append((args, kwargs))
        self.first = hidden if self.first is None else self.first
        if self.form is None:  # only the layer itself knows the form of its output
            self.form = self.inner(hidden, *args, **kwargs)
        return (hidden, *self.form[1:]) if isinstance(self.form, tuple) else hidden


@contextmanager
def _hand_on(layers: Sequence[nn.Module]) -> Iterator[list[_StandIn]]:
    stand_ins = [_StandIn(layer) for layer in layers]
    try:
        for layer, stand_in in zip(layers, stand_ins, strict=True):
            layer.forward = stand_in
        yield stand_ins
    finally:
        for layer in layers:
            del layer.forward
