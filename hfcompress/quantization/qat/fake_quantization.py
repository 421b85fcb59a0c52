"""Fake quantization: a float model that rounds as its quantized self will, and learns with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hfcompress.models.linears import linears
from hfcompress.quantization.grids.embeddings import rounded_rows
from hfcompress.training.overlay import TrainingOverlay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.quantization.grids.ranges import Ranges

Rounding = Callable[[Tensor], Tensor]
"""From floats to what is kept of them, made floats again."""


class FakeQuantization(TrainingOverlay):
    """Linear layers compute with the weights that a backend would store, and embedding tables give the rows it would.

    Gradients go straight through the rounding (Bengio et al. 2013, arXiv:1308.3432). In eval mode the model computes
    what the exported graph will. A kind that rounds the linear layers' inputs too overrides `readers`.
    """

    def __init__(self, weights: Rounding, table_bits: Literal[8, 4] | None = None) -> None:
        """Changes nothing yet.

        Args:
            weights: Of a linear layer's weights `(out_features, in_features)`.
            table_bits: Of the words' table, see `embedding_grid`; None where embedding tables stay in float.
        """
        super().__init__()
        self.weights, self.table_bits = weights, table_bits

    def rounded(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        """What each linear layer multiplies with, by its path."""
        return {path: straight(layer.weight, self.weights) for path, layer in linears(model).items()}

    def readers(self, progress: float) -> Mapping[str, Rounding]:
        """How linear layers round what they read, by their paths."""
        return {}

    def ranges(self) -> Ranges | None:
        """What the training came to; None where the weights alone are rounded."""
        return None

    @contextmanager
    def applied(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        layers = linears(model)
        own, hooks = {path: layer.weight for path, layer in layers.items()}, list[Any]()
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            rounded, readers = self.rounded(model), self.readers(progress)
        try:
            hooks.append(model.register_forward_pre_hook(self._look, with_kwargs=True))
            hooks += [
                layers[path].register_forward_pre_hook(partial(_read, reader)) for path, reader in readers.items()
            ]
            hooks += [table.register_forward_hook(partial(_rows, rounding)) for table, rounding in self._tables(model)]
            for path, weight in rounded.items():
                _put(layers[path], weight)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for path, weight in own.items():
                _put(layers[path], weight)

    def _look(self, _model: Any, _inputs: Any, named: Mapping[str, Any]) -> None:
        """Before each forward pass, at its inputs."""

    def settle(self, model: PreTrainedModel) -> None:
        """The weights become what is stored of them."""
        with torch.no_grad():
            rounded = self.rounded(model)
            for path, layer in linears(model).items():
                layer.weight.copy_(rounded[path])
            tied = {id(layer.weight) for layer in linears(model).values()}
            for table, rounding in self._tables(model):
                if id(table.weight) not in tied:
                    table.weight.copy_(rounding(table.weight))

    def _tables(self, model: PreTrainedModel) -> list[tuple[nn.Embedding, Rounding]]:
        """The embedding tables that `graphs.embeddings` stores in fewer bits, and how it rounds their rows."""
        if self.table_bits is None:
            return []
        # Those inside of an encoder are of relative positions, and stay as they are.
        tables = [m for path, m in model.named_modules() if isinstance(m, nn.Embedding) and ".encoder." not in path]
        words = set(model.get_input_embeddings().modules())  # of factored words the table is inside
        return [(table, partial(rounded_rows, bits=self.table_bits if table in words else 8)) for table in tables]


def straight(values: Tensor, rounding: Rounding) -> Tensor:
    """Values rounded, with the gradient of those that are not."""
    rounded: Tensor = _Straight.apply(values, rounding)
    return rounded


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: Tensor, rounding: Rounding) -> Tensor:
        return rounding(values)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _read(reader: Rounding, _layer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return reader(inputs[0])


def _rows(rounding: Rounding, _table: Any, _inputs: Any, rows: Tensor) -> Tensor:
    return straight(rows.flatten(0, -2), rounding).view_as(rows)


def _put(layer: nn.Linear, weight: Tensor) -> None:
    """Without a parameter's checks: what is made of one takes its place for a while."""
    layer._parameters["weight"] = weight  # type: ignore[assignment]
