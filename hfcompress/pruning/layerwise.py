"""Runs a model one layer at a time, over rows that are kept in memory between one layer and the next.

What is decided of a layer can then rest on what the layers before it give after they were changed, and the whole
costs a few forward passes instead of one for each layer.
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
"""What a layer is called with beside the hidden states: masks, positions."""


@dataclass
class Rows:
    """A batch between two layers.

    Attributes:
        hidden: What goes into the next layer, `(batch, length, hidden)`.
        real: True at real tokens, `(batch, length)`.
        calls: For each layer's weights, its calls: one, or several where it runs again and again.
    """

    hidden: Tensor
    real: Tensor
    calls: list[list[Call]]

    def tokens(self, values: Tensor) -> Tensor:
        """Values `(batch, length, width)` at the real tokens, `(tokens, width)`."""
        return values.flatten(0, 1) if self._full else values[self.real]

    @cached_property
    def _full(self) -> bool:
        return bool(self.real.all())


@dataclass
class Run:
    """What one run of a layer shows.

    Attributes:
        hidden: What went in.
        inputs, outputs: Of the watched modules, by their path; of several calls in a run the first.
        result: What came out; what went in, where the run was stopped.
    """

    hidden: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    result: Tensor = None  # type: ignore[assignment]


def start(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Rows]:
    """The batches before the first layer."""
    import torch

    device, found, told = next(model.parameters()).device, [], list(batches)

    def show(batch: Mapping[str, Tensor], rows: int | None = None) -> dict[str, Tensor]:
        inputs = {name: value[:rows].to(device) for name, value in batch.items() if name != "labels"}
        observe(model, inputs)
        return inputs

    with torch.no_grad(), freeze(model), _handing_on(layers_of(model)) as stand_ins:
        for batch in told[:1]:
            show(batch, 1)  # the first time each layer really runs, so one row is enough
        for batch in told:
            for stand_in in stand_ins:
                stand_in.calls, stand_in.first = [], None
            inputs = show(batch)
            first, calls = stand_ins[0].first, [stand_in.calls for stand_in in stand_ins]
            assert first is not None
            found.append(Rows(first, inputs["attention_mask"].bool(), calls))
    return found


def runs(model: nn.Module, index: int, rows: Rows, watched: Sequence[str] = (), stop: str = "") -> Iterator[Run]:
    """Runs a layer of the model as often as the model does, from one run's result to the next.

    Args:
        model: A model in eval mode whose embeddings are those that `rows` came from.
        index: Which layer of its stack.
        rows: The batch, before the layer; it is left there.
        watched: Paths of modules of the layer whose inputs and outputs are wanted.
        stop: The last run ends before this module, once its input is known.
    """
    import torch

    layer, calls, hidden = layers_of(model)[index], rows.calls[index], rows.hidden
    for number, (args, kwargs) in enumerate(calls, start=1):
        seen = Run(hidden, result=hidden)
        with torch.no_grad(), _watching(layer, seen, {*watched, stop} - {""}, stop if number == len(calls) else ""):
            try:
                output = layer(hidden, *args, **kwargs)
                seen.result = hidden = output[0] if isinstance(output, tuple) else output
            except _Stopped:
                pass
        yield seen


class _Stopped(Exception):  # noqa: N818
    pass


@contextmanager
def _watching(layer: nn.Module, seen: Run, paths: Iterable[str], stop: str) -> Iterator[None]:
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
    """In a layer's place: it writes down its calls and hands its input on, in the form of the layer's output."""

    def __init__(self, layer: nn.Module) -> None:
        self.inner = layer.forward
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        self.form: Any = None

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # A decoder's cache would grow with every run.
        kwargs = {name: None if name == "past_key_values" else value for name, value in kwargs.items()}
        self.calls.append((args, kwargs))
        self.first = hidden if self.first is None else self.first
        if self.form is None:  # only the layer itself knows
            self.form = self.inner(hidden, *args, **kwargs)
        return (hidden, *self.form[1:]) if isinstance(self.form, tuple) else hidden


@contextmanager
def _handing_on(layers: Sequence[nn.Module]) -> Iterator[list[_StandIn]]:
    stand_ins = [_StandIn(layer) for layer in layers]
    try:
        for layer, stand_in in zip(layers, stand_ins, strict=True):
            layer.forward = stand_in
        yield stand_ins
    finally:
        for layer in layers:
            del layer.forward
