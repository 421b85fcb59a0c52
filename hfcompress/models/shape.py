"""The shape of a model, and its parameters, bytes and MACs by arithmetic; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hfcompress.models.architectures import (
    ARCHITECTURES,
    PRUNED,
    TASK_HEADS,
    ArchitectureSpec,
    UnsupportedError,
    architecture_of,
    class_name_of,
    task_head_of,
)
from hfcompress.models.bounds import is_count, require_bound, shorten
from hfcompress.models.config_checks import (
    read_head_dim,
    read_kv_heads,
    read_layer_sizes,
    refuse_variants,
    require_sizes,
)
from hfcompress.utils.errors import HfcompressError, did_you_mean


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attention heads and FFN neurons.

    Attributes:
        bias_columns: For MPNet: the columns of the shared table of relative positions that its heads read, ascending;
            empty if they are the first columns.
    """

    heads: int
    ffn: int
    bias_columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Compare the lengths first: a config may claim many heads, and most architectures have no such columns.
        if len(self.bias_columns) == self.heads and self.bias_columns == tuple(range(self.heads)):
            object.__setattr__(self, "bias_columns", ())


@dataclass(frozen=True)
class Shape:
    """The sizes of an encoder or a decoder with its task head.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        layers: One entry for each layer.
        hidden: Hidden width, the width of the residual stream.
        head_dim: Width of one attention head.
        vocab: Rows of the word-embedding table.
        positions: Rows of the position table; the longest input for a model without such a table.
        types: Rows of the token-type table (0 without one).
        labels: Outputs of the task head; not used for a mask or causal head, which has one for each token of the
            vocabulary.
        head: The kind of task head, a key of `TASK_HEADS`.
        embedding: Width of the word embeddings; 0 if it is the hidden width.
        embedding_rank: Inner width of word embeddings that are a product of two matrices; 0 if they are one table.
        relative: Buckets of relative positions (0 for an attention without them).
        bias_heads: For MPNet: columns of the table of relative positions, one for each head of a layer (0 elsewhere).
        group: Query heads that share a key and value head; 1 if each has its own.
        tied: True if a mask or causal head shares its weights with the word embeddings.
        linear_bits: Bits of a stored weight of the layers' linear modules.
        embedding_bits: Bits of a stored word-embedding weight.
        head_bits: Bits of a stored weight of the task head's linear modules (pooler, classifier); 0 for `other_bits`.
        other_bits: Bits of any other stored parameter.
        even: True if each entry of `layers` is exact. False if only their sums are, because a global ranking decides
            where to cut.
        estimated: True if sizes are approximate, because a budget or a corpus decides them.
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
    embedding: int = 0
    embedding_rank: int = 0
    relative: int = 0
    bias_heads: int = 0
    group: int = 1
    tied: bool = True
    linear_bits: float = 32
    embedding_bits: float = 32
    head_bits: float = 0
    other_bits: float = 32
    even: bool = True
    estimated: bool = False

    def __post_init__(self) -> None:
        if self.embedding == self.hidden:
            object.__setattr__(self, "embedding", 0)

    @property
    def spec(self) -> ArchitectureSpec:
        """The architecture's entry in `ARCHITECTURES`."""
        return ARCHITECTURES[self.architecture]

    @property
    def usable_positions(self) -> int:
        """The longest input that the position table allows, in tokens."""
        return self.positions - self.spec.position_offset

    @property
    def stock(self) -> bool:
        """True if a stock config can express the shape.

        All layers must be equal and have an FFN, the heads must fill the hidden width, and the word embeddings must be
        one table. If the config has the width of a head, any number of heads is possible (in Llama, any that divides
        the hidden width).
        """
        full = all(x.ffn and self._is_stock_head_count(x.heads) for x in self.layers)
        full_bias = not self.bias_heads or self.bias_heads * self.head_dim == self.hidden
        return full and full_bias and len(set(self.layers)) <= 1 and not self.embedding_rank

    def _is_stock_head_count(self, heads: int) -> bool:
        if self.spec.keys.head_dim:
            return heads > 0 and not (self.spec.heads_divide_hidden and self.hidden % heads)
        return heads * self.head_dim == self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters outside the layers and the task head.

        These are the tables of words, positions (relative ones too) and token types, their norms, the projection to
        the hidden width, and the norm after the last layer of ModernBERT and of decoders.
        """
        spec, width, hidden = self.spec, self.embedding or self.hidden, self.hidden
        words = self.vocab * self._word_width + self._factor
        tables = words + (self.types + self.positions * spec.position_table) * width
        if spec.modern or spec.decoder:
            return tables + (2 * hidden if spec.modern else hidden)
        if spec.disentangled:
            return tables + self._projection + 2 * self.relative * hidden + 4 * hidden
        bias = hidden if self._projection else 0
        return tables + 2 * width + self._projection + bias + self.relative * self.bias_heads

    @property
    def encoder_parameters(self) -> int:
        """Parameters of all transformer layers: weights, biases and layer norms."""
        return sum(self._linear_weights(x) + self._layer_vectors(i, x) for i, x in enumerate(self._stored_layers))

    @property
    def head_parameters(self) -> int:
        """Parameters of the task head: pooler and classifier.

        A mask head has a dense layer, its norm and a bias for each word; its word weights count as embeddings.
        """
        width, outputs, dense = self._head_sizes
        if self.spec.decoder and self.head in ("sequence", "causal"):
            return 0 if self.head == "causal" and self.tied else width * outputs
        norms = 3 if self.head == "mask" and not self.spec.modern else 1
        vectors = norms * width if dense else 0
        return dense + vectors + outputs + (0 if self.head == "mask" else width * outputs)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model with its task head."""
        return self.embedding_parameters + self.encoder_parameters + self.head_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the stored weights, without the headers of the files."""
        linear = sum(self._linear_weights(x) for x in self._stored_layers) + self._projection + self._factor
        words = self.vocab * self._word_width
        width, outputs, dense = self._head_sizes
        head = dense + width * outputs * (self.head not in ("mask", "causal") or not self.tied)
        rest = self.parameters - linear - words - head
        stored = linear * self.linear_bits + words * self.embedding_bits + head * (self.head_bits or self.other_bits)
        return int((stored + rest * self.other_bits) / 8)

    def macs(self, length: int) -> int:
        """Counts the multiply-accumulate operations for one sequence of `length` tokens.

        A head takes `3 S H d + 2 S² d + S d H` and an FFN neuron `2 S H` (Kwon et al. 2022, arXiv:2204.09656), or
        `3 S H` in a gated FFN. Two thirds of `3 S H d` (keys and values) are shared by the query heads of a group. With
        `R` relative positions DeBERTa adds `2 R H d + 2 S R d` a head. Causal attention and attention within a window
        count like full attention, because they are computed in full and masked. The linear modules of a sequence head
        read one token; those of any other task head, and of a decoder's, read every token.
        """
        s, h, d, r = length, self.hidden, self.head_dim, 2 * self.relative if self.spec.disentangled else 0
        per_head = 2 * s * h * d + 2 * s * s * d + 2 * r * h * d + 2 * s * r * d
        per_group = per_head * self.group + 2 * s * h * d
        per_neuron = (2 + self.spec.gated_ffn) * s * h
        width, outputs, dense = self._head_sizes
        read = 1 if self.head == "sequence" and not self.spec.decoder else s
        layers = sum(x.heads // self.group * per_group + x.ffn * per_neuron for x in self.layers)
        return layers + s * (self._projection + self._factor) + read * (dense + width * outputs)

    def with_layers(self, layers: int, heads: int, ffn: int) -> Shape:
        """Returns the same shape, but with `layers` equal layers."""
        return replace(self, layers=(Layer(heads, ffn),) * layers, bias_heads=heads if self.bias_heads else 0)

    @property
    def _stored_layers(self) -> tuple[Layer, ...]:
        """The layers that have weights of their own."""
        return self.layers[:1] if self.spec.shared_layers else self.layers

    @property
    def _word_width(self) -> int:
        """Columns of the word-embedding table."""
        return self.embedding_rank or self.embedding or self.hidden

    @property
    def _factor(self) -> int:
        """Weights of the second matrix of word embeddings that are a product of two."""
        return self.embedding_rank * (self.embedding or self.hidden)

    @property
    def _projection(self) -> int:
        """Weights between the word embeddings and the first layer."""
        return (self.embedding or self.hidden) * self.hidden if self.embedding or self.spec.shared_layers else 0

    @property
    def _head_sizes(self) -> tuple[int, int, int]:
        """Input width and outputs of the task head's last layer, and the weights of the dense layer before it or 0."""
        if self.head == "causal":
            return self.hidden, self.vocab, 0
        if self.head == "mask":
            width = self.embedding or self.hidden
            return width, self.vocab, self.hidden * width
        dense = (self.head == "sequence" or self.spec.modern) and not self.spec.decoder
        return self.hidden, self.labels, self.hidden * self.hidden * dense

    def _linear_weights(self, layer: Layer) -> int:
        heads = layer.heads + layer.heads // self.group
        return 2 * self.hidden * heads * self.head_dim + (2 + self.spec.gated_ffn) * self.hidden * layer.ffn

    def _layer_vectors(self, index: int, layer: Layer) -> int:
        if self.spec.modern:  # the norm of the embeddings is that of the first layer
            return 2 * self.hidden if index else self.hidden
        if self.spec.decoder:
            biased = (layer.heads + 2 * (layer.heads // self.group)) * self.spec.qkv_bias
            return 2 * self.hidden + (biased + 2 * self.spec.qk_norm) * self.head_dim
        return 3 * layer.heads * self.head_dim + self.hidden + layer.ffn + self.hidden + 4 * self.hidden


def shape_of(config: Mapping[str, Any], labels: int | None = None, head: str | None = None) -> Shape:
    """Reads the shape that a config.json describes.

    Args:
        config: The content of the file; `per_layer_config` holds the sizes of uneven layers. A missing key has
            transformers' default.
        labels: Outputs of the task head, if the task decides them and not the config.
        head: The kind of task head, if the task decides it; by default that of the class in the config. A model without
            a task head counts as a classifier of sequences.

    Raises:
        UnsupportedError: for an architecture, or a variant of one, that is not supported.
        HfcompressError: for missing or impossible sizes.
    """
    kind = architecture_of(config)[:100]
    if not kind:
        raise UnsupportedError("the config names no model_type", "use a complete config.json")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(f"the architecture '{kind}' is not supported", did_you_mean(kind, ARCHITECTURES))
    spec = ARCHITECTURES[kind]
    keys, sizes = spec.keys, {**spec.keys.defaults, **config}
    head = head or _named_task_head(spec, config)
    if head not in spec.task_head_kinds:
        message = f"transformers has no {kind} model '…{TASK_HEADS[head]}'"
        raise HfcompressError(message, "name another model, or another type of task")
    refuse_variants(kind, sizes, {**keys.required, **({"tie_word_embeddings": True} if head == "mask" else {})})
    require_sizes(kind, keys, sizes)
    hidden, head_dim = sizes[keys.hidden], read_head_dim(kind, keys, sizes)
    if spec.disentangled:
        refuse_variants(kind, sizes, {"attention_head_size": head_dim, "pooler_hidden_size": hidden})
    return Shape(
        architecture=kind,
        layers=tuple(_layers(spec, sizes)),
        hidden=hidden,
        head_dim=head_dim,
        vocab=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        types=sizes.get(keys.token_types) or 0,
        labels=labels or count_labels(config),
        head=head,
        group=sizes[keys.heads] // read_kv_heads(kind, keys, sizes),
        tied=head != "causal" or bool(sizes["tie_word_embeddings"]),
        embedding=sizes.get(keys.embedding) or hidden,
        embedding_rank=config.get("embedding_rank") or 0,
        relative=sizes.get(keys.relative) or 0,
        bias_heads=(sizes.get("bias_heads") or sizes[keys.heads]) if spec.shared_position_bias else 0,
    )


def count_labels(config: Mapping[str, Any]) -> int:
    """Counts the outputs of the task head that a config.json describes; 2 if it says nothing.

    Raises:
        HfcompressError: for labels that are not a mapping, or for an impossible number of them.
    """
    names = config.get("id2label")
    if names is not None and not isinstance(names, Mapping):
        raise HfcompressError(f"the config's id2label is {shorten(names)}", "it maps ids to label names")
    count = len(names or {}) or config.get("num_labels")
    if count is None:
        return 2
    if not is_count(count, 1):
        raise HfcompressError(f"the config says num_labels: {shorten(count)}", "it takes a whole number above 0")
    require_bound("num_labels" if not names else "id2label with entries", count, "labels")
    return int(count)


def _named_task_head(spec: ArchitectureSpec, config: Mapping[str, Any]) -> str:
    head = task_head_of(class_name_of(config))
    return head if head in spec.task_head_kinds else "sequence"


def _layers(spec: ArchitectureSpec, sizes: Mapping[str, Any]) -> Iterator[Layer]:
    per_layer = read_layer_sizes(spec.keys, sizes)
    for index in range(sizes[spec.keys.layers]):
        own = per_layer.get(index, {})
        heads, ffn = (own.get(key, sizes[key]) for key in (spec.keys.heads, spec.keys.ffn))
        yield Layer(heads, ffn, tuple(own.get("kept_heads", ())))


def config_of(shape: Shape, base: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the config.json of a shape.

    A stock constructor must accept the sizes at the top level. A shape that no stock config can express has nominal
    ones there: the widest FFN, and as many heads as fill the hidden width (1 if no number does; the heads of the widest
    layer if the config has the width of a head). `head_dim` then is the width of a head, and `per_layer_config` has the
    true sizes of each layer.

    Args:
        shape: The shape.
        base: The config of a model of the architecture, for everything else (activations, dropout, labels).
    """
    keys = shape.spec.keys
    widest = max((layer.ffn for layer in shape.layers), default=0)
    config = {k: v for k, v in base.items() if k not in _PRUNED_KEYS} | {
        "model_type": shape.architecture if shape.stock else PRUNED + shape.architecture,
        keys.layers: len(shape.layers),
        keys.heads: _nominal_heads(shape),
        keys.hidden: shape.hidden,
        keys.ffn: max(widest, 1),
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
    }
    config |= _further_sizes(shape, base)
    return config if shape.stock else config | _pruned_sizes(shape)


def _nominal_heads(shape: Shape) -> int:
    if shape.spec.keys.head_dim:
        return max((layer.heads for layer in shape.layers), default=0) or shape.group
    return shape.hidden // shape.head_dim if shape.hidden % shape.head_dim == 0 else 1


_PRUNED_KEYS = ("per_layer_config", "head_dim", "bias_heads", "embedding_rank", "auto_map")


def _pruned_sizes(shape: Shape) -> dict[str, Any]:
    """Writes the keys that only the config of a pruned shape has."""
    keys = shape.spec.keys
    layers: dict[str, dict[str, Any]] = {
        str(i): {keys.heads: x.heads, keys.ffn: x.ffn} for i, x in enumerate(shape.layers)
    }
    for index, layer in enumerate(shape.layers):
        if keys.kv_heads:
            layers[str(index)][keys.kv_heads] = layer.heads // shape.group
        if layer.bias_columns:
            layers[str(index)]["kept_heads"] = list(layer.bias_columns)
    further = {"bias_heads": shape.bias_heads, "embedding_rank": shape.embedding_rank}
    return {"head_dim": shape.head_dim, "per_layer_config": layers} | {k: v for k, v in further.items() if v}


def _further_sizes(shape: Shape, base: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the sizes that only some architectures have, and the keys of `base` that depend on the new sizes."""
    keys, kinds = shape.spec.keys, base.get("layer_types") or [""]
    sizes = {
        keys.token_types: shape.types,
        keys.embedding: shape.embedding or shape.hidden,
        keys.relative: shape.relative,
        keys.kv_heads: _nominal_heads(shape) // shape.group,
        keys.head_dim: shape.head_dim,
    }
    follows = {
        "pooler_hidden_size": shape.hidden,
        "attention_head_size": shape.head_dim,
        "layer_types": [kinds[i % len(kinds)] for i in range(len(shape.layers))],
        # -1 means max_position_embeddings. With fewer positions the rows of the table would mean other distances.
        "max_relative_positions": max(base.get("max_relative_positions", 0), 0) or base.get("max_position_embeddings"),
    }
    return {key: value for key, value in sizes.items() if key} | {k: v for k, v in follows.items() if base.get(k)}
