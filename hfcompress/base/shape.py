"""The shape of an encoder and what follows from it: parameters, bytes, MACs. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfcompress.base.errors import HfcompressError, did_you_mean


@dataclass(frozen=True)
class Keys:
    """What an architecture's config.json calls the parts of its shape, and which parts it has.

    Attributes:
        pooler: Whether the classifier sits on a pooler (a `hidden x hidden` linear layer of the encoder's own).
        dense_head: Whether the classifier has a `hidden x hidden` linear layer of its own.
        position_offset: Rows of the position table that no token uses (RoBERTa's padding index).
        plain_attention: Whether the attention scores are `Q Kᵀ / √d` of the linear layers' outputs: no relative
            positions, no rotation.
    """

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    types: str = "type_vocab_size"
    pooler: bool = False
    dense_head: bool = False
    position_offset: int = 0
    plain_attention: bool = True


ARCHITECTURES: dict[str, Keys] = {
    "bert": Keys(pooler=True),
    "distilbert": Keys("n_layers", "n_heads", "dim", "hidden_dim", types="", dense_head=True),
    "roberta": Keys(dense_head=True, position_offset=2),
}
HEADS: dict[str, str] = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "mask": "ForMaskedLM",
}
"""The kinds of head, and how transformers' class names end."""
PRUNED = "pruned_"
"""Prefix of the `model_type` of a checkpoint whose shape no stock config can express."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attention heads and FFN neurons."""

    heads: int
    ffn: int


@dataclass(frozen=True)
class Shape:
    """An encoder with a classification head.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        layers: One entry a layer.
        hidden: Width of the residual stream.
        head_dim: Width of one attention head.
        vocab: Rows of the word-embedding table.
        positions: Rows of the position table.
        types: Rows of the token-type table (0 where there is none).
        labels: Outputs of the head.
        head: A key of `HEADS`.
        linear_bits: Bits a weight of the encoder's linear layers takes when stored.
        embedding_bits: Bits a word-embedding weight takes when stored.
        other_bits: Bits any other parameter takes when stored.
        even: Whether `layers` is known layer by layer; where not, only the totals are, since a global ranking decides.
    """

    architecture: str
    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    vocab: int
    positions: int
    types: int
    labels: int
    head: str = "sequence"
    linear_bits: float = 32
    embedding_bits: float = 32
    other_bits: float = 32
    even: bool = True

    @property
    def keys(self) -> Keys:
        """What the architecture's config calls its parts."""
        return ARCHITECTURES[self.architecture]

    @property
    def usable_positions(self) -> int:
        """The longest input the position table allows, in tokens."""
        return self.positions - self.keys.position_offset

    @property
    def stock(self) -> bool:
        """Whether a stock config can express the shape: equal layers with an FFN whose heads fill the hidden width."""
        full = all(x.ffn and x.heads * self.head_dim == self.hidden for x in self.layers)
        return full and len(set(self.layers)) <= 1

    @property
    def embedding_parameters(self) -> int:
        """Word, position and token-type tables and their layer norm."""
        return (self.vocab + self.positions + self.types + 2) * self.hidden

    @property
    def encoder_parameters(self) -> int:
        """All transformer layers: weights, biases and layer norms, without embeddings, pooler and head."""
        return sum(self._linear_weights(x) + self._layer_vectors(x) for x in self.layers)

    @property
    def head_parameters(self) -> int:
        """Pooler and classifier."""
        dense = self.hidden * self.hidden + self.hidden
        return dense * (self.keys.pooler + self.keys.dense_head) + (self.hidden + 1) * self.labels

    @property
    def parameters(self) -> int:
        """All parameters of the model with its head."""
        return self.embedding_parameters + self.encoder_parameters + self.head_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the stored weights, without the file's own headers."""
        linear = sum(self._linear_weights(x) for x in self.layers)
        words = self.vocab * self.hidden
        rest = self.parameters - linear - words
        return int((linear * self.linear_bits + words * self.embedding_bits + rest * self.other_bits) / 8)

    def macs(self, length: int) -> int:
        """Multiply-accumulates of one sequence of `length` tokens.

        Per head `3 S H d + 2 S² d + S d H`, per FFN neuron `2 S H` (Kwon et al. 2022, arXiv:2204.09656), and the
        head's linear layers on one token.
        """
        s, h, d = length, self.hidden, self.head_dim
        per_head, per_neuron = 4 * s * h * d + 2 * s * s * d, 2 * s * h
        dense = h * h * (self.keys.pooler + self.keys.dense_head)
        return sum(x.heads * per_head + x.ffn * per_neuron for x in self.layers) + dense + h * self.labels

    def with_layers(self, layers: int, heads: int, ffn: int) -> Shape:
        """The same model with `layers` equal layers."""
        return replace(self, layers=(Layer(heads, ffn),) * layers)

    def _linear_weights(self, layer: Layer) -> int:
        return 4 * self.hidden * layer.heads * self.head_dim + 2 * self.hidden * layer.ffn

    def _layer_vectors(self, layer: Layer) -> int:
        return 3 * layer.heads * self.head_dim + self.hidden + layer.ffn + self.hidden + 4 * self.hidden


def shape_of(config: Mapping[str, Any], labels: int | None = None) -> Shape:
    """The shape that a config.json describes.

    Args:
        config: The file's content; an uneven shape stands in its `per_layer_config`.
        labels: Outputs of the head, where the task and not the config decides.

    Raises:
        HfcompressError: for an architecture that is not supported, or a config without its sizes.
    """
    kind = str(config.get("model_type", "")).removeprefix(PRUNED)
    if not kind:
        raise HfcompressError("the config names no model_type", "use a complete config.json")
    if kind not in ARCHITECTURES:
        raise HfcompressError(f"the architecture '{kind}' is not supported", did_you_mean(kind, ARCHITECTURES))
    keys = ARCHITECTURES[kind]
    needed = [keys.layers, keys.heads, keys.hidden, keys.ffn, "vocab_size", "max_position_embeddings"]
    missing = [key for key in needed if type(config.get(key)) is not int or config[key] < 1]
    if missing:
        raise HfcompressError(
            f"the config of this {kind} model has no number above 0 for {', '.join(missing)}",
            "use a complete config.json",
        )
    overrides = {int(i): layer for i, layer in (config.get("per_layer_config") or {}).items()}
    layers = tuple(
        Layer(
            overrides.get(i, {}).get(keys.heads, config[keys.heads]),
            overrides.get(i, {}).get(keys.ffn, config[keys.ffn]),
        )
        for i in range(config[keys.layers])
    )
    return Shape(
        architecture=kind,
        layers=layers,
        hidden=config[keys.hidden],
        head_dim=config[keys.hidden] // config[keys.heads],
        vocab=config["vocab_size"],
        positions=config["max_position_embeddings"],
        types=config.get(keys.types, 2) if keys.types else 0,
        labels=labels or len(config.get("id2label") or {}) or config.get("num_labels", 2),
    )


def config_of(shape: Shape, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of `shape`, everything that is not the shape (activations, dropout, labels) taken from `base`.

    A shape that no stock config can express keeps the nominal sizes (heads that fill the hidden width, the widest
    FFN) at the top and says in `per_layer_config` what each layer really has.
    """
    keys = shape.keys
    nominal_heads = shape.hidden // shape.head_dim
    widest = max((layer.ffn for layer in shape.layers), default=0)
    config = {k: v for k, v in base.items() if k not in ("per_layer_config", "auto_map")} | {
        "model_type": shape.architecture if shape.stock else PRUNED + shape.architecture,
        keys.layers: len(shape.layers),
        keys.heads: nominal_heads,
        keys.hidden: shape.hidden,
        keys.ffn: max(widest, 1),
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
    }
    if not shape.stock:
        config["per_layer_config"] = {
            str(i): {keys.heads: layer.heads, keys.ffn: layer.ffn} for i, layer in enumerate(shape.layers)
        }
    return config
