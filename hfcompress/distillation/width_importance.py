"""Ranks dimensions, heads and neurons by activation, and selects those that a narrower model keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.forward import observe
from hfcompress.models.freezing import freeze
from hfcompress.models.shape import Shape, shape_of
from hfcompress.models.weight_axes import Axis

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Importance:
    """Mean activations of the parts of a model on calibration rows; the lists have one tensor for each layer.

    Attributes:
        residual: `(hidden,)`: mean absolute hidden state, summed over the outputs of the embeddings and all layers.
        heads: `(head groups,)`: mean norm of the head's output, summed over a group that shares keys and values.
        scores: `(head groups, head_dim)`: mean absolute query, summed over the group, times mean absolute key.
        values: `(head groups, head_dim)`: mean absolute output of the head, summed over the group.
        neurons: `(ffn,)`: mean absolute activation after the non-linearity (and the gate, if any).
    """

    residual: Tensor
    heads: list[Tensor]
    scores: list[Tensor]
    values: list[Tensor]
    neurons: list[Tensor]


def rank_dimensions(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> Importance:
    """Ranks dimensions, heads and neurons by mean activation, with forward passes only; padding does not count.

    Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2.

    Args:
        model: A model with its task head; it is not changed.
        batches: Encoded batches, at least one, each with its `attention_mask`.
    """
    import torch

    sums = _Sums(shape_of(model.config.to_dict()).head_dim, len(layers_of(model)))
    with torch.no_grad(), freeze(model), sums.listen(model):
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            sums.add(model, inputs)
    return sums.importance()


class _Sums:
    """Sums of activations over the real tokens, for each part of the model."""

    def __init__(self, head_dim: int, layers: int) -> None:
        self.head_dim, self.layers = head_dim, layers
        self.mask: Any = None
        self.tokens: Any = 0
        self.seen: dict[tuple[str, int], Tensor] = {}

    @contextmanager
    def listen(self, model: nn.Module) -> Iterator[None]:
        modules = spec_of(model).modules
        handles = []
        for index, layer in enumerate(layers_of(model)):
            for path, look in ((modules.attention_output, self._heads), (modules.ffn_out, self._neurons)):
                handles.append(layer.get_submodule(path).register_forward_pre_hook(partial(look, index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.mask = inputs["attention_mask"].bool()
        self.tokens = self.tokens + self.mask.sum()
        observed = observe(model, inputs, frozenset({"hidden_states", "queries", "keys"}))
        for state in observed.hidden_states:
            self._add("residual", 0, state.abs())
        for name, projections in (("queries", observed.queries), ("keys", observed.keys)):
            for number, projection in projections.items():
                # Layers that share their weights count as one.
                self._add(name, min(number, self.layers) - 1, projection.transpose(1, 2).abs())

    def _heads(self, index: int, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0].unflatten(-1, (-1, self.head_dim))
        self._add("heads", index, given.norm(dim=-1))
        self._add("values", index, given.abs())

    def _neurons(self, index: int, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        self._add("neurons", index, inputs[0].abs())

    def _add(self, place: str, index: int, values: Tensor) -> None:
        total = values[self.mask].float().sum(0)
        self.seen[place, index] = self.seen[place, index] + total if (place, index) in self.seen else total

    def importance(self) -> Importance:
        def means(place: str) -> list[Tensor]:
            return [(self.seen[place, index] / self.tokens).cpu() for index in range(self.layers)]

        keys = means("keys")

        def sum_groups(place: str) -> list[Tensor]:
            return [x.unflatten(0, (len(key), -1)).sum(1) for x, key in zip(means(place), keys, strict=True)]

        scores = [query * key for query, key in zip(sum_groups("queries"), keys, strict=True)]
        residual = (self.seen["residual", 0] / self.tokens).cpu()
        return Importance(residual, sum_groups("heads"), scores, sum_groups("values"), means("neurons"))


@dataclass(frozen=True)
class Narrowing:
    """Selects the entries of each axis that stay when a model of shape `old` becomes one of shape `new`.

    Attributes:
        importance: The entries with the highest values stay; without it the first ones.
        same_heads: True if every layer keeps the same heads, because the layers share something for each head.
    """

    old: Shape
    new: Shape
    importance: Importance | None = None
    same_heads: bool = False

    def index(self, axis: Axis, layer: int, have: int, want: int) -> Tensor | None:
        """Selects the entries of an axis that stay, in order; None if there are too few, or no meaningful choice.

        Args:
            axis: The meaning of the axis.
            layer: The old model's layer, from 0; not used outside the layers.
            have: The number of entries of the old axis.
            want: The number of entries of the new axis.
        """
        import torch

        parts = max(len(axis), 1)
        if want > have or (want < have and axis in ((), ("vocab",))):
            return None
        each = [self._part(part, layer, have // parts, want // parts) for part in axis or ("",)]
        return torch.cat([index + number * (have // parts) for number, index in enumerate(each)])

    def _part(self, part: str, layer: int, have: int, want: int) -> Tensor:
        known = self.importance
        if part in ("scores", "values"):
            return self._dimensions(part, layer, have, want)
        if part == "heads":
            return select_best(self._head_scores(layer), want, have)
        if known and part == "residual":
            return select_best(known.residual, want, have)
        if known and part == "neurons":
            return select_best(known.neurons[layer], want, have)
        return select_best(None, want, have)

    def _head_scores(self, layer: int) -> Tensor | None:
        if self.importance is None:
            return None
        heads = self.importance.heads
        return sum(heads[1:], heads[0]) if self.same_heads else heads[layer]

    def _dimensions(self, part: str, layer: int, have: int, want: int) -> Tensor:
        """Selects dimensions of heads: some of each head that stays, or whole heads if there are more or wider heads.

        Heads that share keys and values stay or go together, with the same dimensions.
        """
        import torch

        old, new, known = self.old.head_dim, self.new.head_dim, self.importance
        # On the axis of keys or values, one head stands for its group.
        group = self.old.group if have // old == self.old.layers[layer].heads else 1
        count, width = want // new // group, new
        if new > old or count > have // old // group:
            count, width = -(-want // (old * group)), old
        # A rotation turns dimension i with i + half, so both stay or both go.
        pairs = 2 if part == "scores" and self.old.spec.rotary else 1
        kept = []
        for shared in select_best(self._head_scores(layer), count, have // old // group):
            scores = None
            if known:
                scores = (known.scores if part == "scores" else known.values)[layer][shared].unflatten(0, (pairs, -1))
            first = select_best(None if scores is None else scores.sum(0), width // pairs, old // pairs)
            dims = torch.cat([first + half * (old // pairs) for half in range(pairs)])
            kept += [(shared * group + head) * old + dims for head in range(group)]
        return torch.cat(kept)[:want]


def select_best(scores: Tensor | None, count: int, of: int) -> Tensor:
    """Selects the indices of the `count` highest scores, ascending; the first of equal scores, or without scores."""
    import torch

    if scores is None or count == of:
        return torch.arange(count)
    return scores.argsort(descending=True, stable=True)[:count].sort().values
