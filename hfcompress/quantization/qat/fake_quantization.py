"""Fake quantization: while it trains, a float model rounds like the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from hfcompress.models.linears import linears
from hfcompress.quantization.grids.rowwise import fake_quantize_rowwise
from hfcompress.training.overlay import TrainingOverlay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.quantization.grids.ranges import Ranges

Rounding = Callable[[Tensor], Tensor]
"""Quantizes and dequantizes."""


class FakeQuantization(TrainingOverlay):
    """Makes linear layers compute with the weights that a backend would store, and embeddings return the stored rows.

    Gradients pass the rounding unchanged (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). In eval
    mode the model computes what the exported graph will. Subclasses that also round the linear layers' inputs override
    `input_roundings`.
    """

    def __init__(self, weights: Rounding, table_bits: Literal[8, 4] | None = None) -> None:
        """Keeps the options, without changing a model.

        Args:
            weights: Quantizes and dequantizes a linear layer's weights `(out_features, in_features)`.
            table_bits: Bits of the word embeddings, see `grids.rowwise`; None if embeddings stay in float32.
        """
        super().__init__()
        self.weights, self.table_bits = weights, table_bits

    def round_weights(self, model: PreTrainedModel) -> Mapping[str, Tensor]:
        """Returns the weights that each linear layer computes with, by its path."""
        return {path: round_straight_through(layer.weight, self.weights) for path, layer in linears(model).items()}

    def input_roundings(self, progress: float) -> Mapping[str, Rounding]:
        """Returns the rounding of the inputs of linear layers, by their paths."""
        return {}

    def ranges(self) -> Ranges | None:
        """Returns the ranges after training; None if only weights are rounded."""
        return None

    @contextmanager
    def lay_over(self, model: PreTrainedModel, progress: float) -> Iterator[None]:
        layers = linears(model)
        own, hooks = {path: layer.weight for path, layer in layers.items()}, list[Any]()
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            weights, roundings = self.round_weights(model), self.input_roundings(progress)
        try:
            hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            hooks += [
                layers[path].register_forward_pre_hook(partial(_round_input, rounding))
                for path, rounding in roundings.items()
            ]
            hooks += [
                table.register_forward_hook(partial(_round_rows, rounding)) for table, rounding in self._tables(model)
            ]
            for path, weight in weights.items():
                _replace_weight(layers[path], weight)
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for path, weight in own.items():
                _replace_weight(layers[path], weight)

    def _before_forward(self, _model: Any, _inputs: Any, named: Mapping[str, Any]) -> None:
        """Reads the inputs before each forward pass."""

    def settle(self, model: PreTrainedModel) -> None:
        """Replaces the weights by the ones that will be stored."""
        with torch.no_grad():
            rounded = self.round_weights(model)
            for path, layer in linears(model).items():
                layer.weight.copy_(rounded[path])
            tied = {id(layer.weight) for layer in linears(model).values()}
            for table, rounding in self._tables(model):
                if id(table.weight) not in tied:
                    table.weight.copy_(rounding(table.weight))

    def _tables(self, model: PreTrainedModel) -> list[tuple[nn.Embedding, Rounding]]:
        """Returns the embedding tables that `graphs.embeddings` quantizes, and the rounding of their rows."""
        if self.table_bits is None:
            return []
        # Tables inside of an encoder hold relative positions, and stay as they are.
        tables = [m for path, m in model.named_modules() if isinstance(m, nn.Embedding) and ".encoder." not in path]
        words = set(model.get_input_embeddings().modules())  # if they are factorized, the table is inside
        return [
            (table, partial(fake_quantize_rowwise, bits=self.table_bits if table in words else 8)) for table in tables
        ]


def round_straight_through(values: Tensor, rounding: Rounding) -> Tensor:
    """Rounds values and passes their gradient through unchanged."""
    rounded: Tensor = _StraightThrough.apply(values, rounding)
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, values: Tensor, rounding: Rounding) -> Tensor:
        return rounding(values)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def _round_input(rounding: Rounding, _layer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    return rounding(inputs[0])


def _round_rows(rounding: Rounding, _table: Any, _inputs: Any, rows: Tensor) -> Tensor:
    return round_straight_through(rows.flatten(0, -2), rounding).view_as(rows)


def _replace_weight(layer: nn.Linear, weight: Tensor) -> None:
    """Puts a computed tensor in the place of a parameter, which a plain assignment refuses.

    `torch.func.functional_call` does the same for a single call of the model; the overlay lasts over any number of
    calls. `torch.nn.utils.parametrize` would rename the parameters, and with them checkpoints and saved models.
    """
    layer._parameters["weight"] = weight  # type: ignore[assignment]
