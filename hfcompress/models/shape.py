"""The shape of a model and what follows from it: parameters, bytes, MACs. Pure arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hfcompress.models.bounds import LARGEST, is_count, require_bound, shown
from hfcompress.utils.errors import HfcompressError, did_you_mean


@dataclass(frozen=True)
class ArchitectureSpec:
    """What an architecture's config.json calls the parts of its shape, and which parts it has.

    Attributes:
        types: Token types; empty where there are none.
        embedding: Width of the word embeddings, where it may differ from the hidden width.
        relative: Buckets of relative positions, where the attention has them.
        kv_heads: Key and value heads, where several query heads may share one.
        head_dim: Width of a head, where the config says it: the heads need not fill the hidden width.
        defaults: What transformers takes for a key that config.json leaves out.
        required: Values that fix which weights there are; a config with another one is refused.
        position_table: Whether each position has an embedding of its own.
        position_offset: Rows of the position table that no token uses (RoBERTa's padding index).
        plain_attention: Whether the attention scores are `Q Kᵀ / √d` of the linear layers' outputs: no relative
            positions, no rotation.
        shared_bias: MPNet: a table of relative positions with a column for each head is added in every layer.
        shared: ALBERT: one layer's weights serve as all layers, and the word embeddings are always projected.
        disentangled: DeBERTa: a table of relative positions goes through every layer's queries and keys; the norm
            of the embeddings follows their projection, which has no bias.
        modern: ModernBERT: the FFN is gated, a norm stands before each block and after the last layer, no layer has
            a bias, and every kind of head has the dense layer and norm.
        decoder: Llama: as ModernBERT's layers, but of separate linear layers, with a causal mask, and with a head that
            is one linear layer, which reads every token. No bias but in heads and where `qkv_bias` says so.
        divided: Llama: transformers refuses a number of heads that does not divide the hidden width, `head_dim` or not.
        qkv_bias: Qwen2: queries, keys and values have biases.
        qk_norm: Qwen3: queries and keys are normed, head by head.
    """

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    types: str = "type_vocab_size"
    embedding: str = ""
    relative: str = ""
    kv_heads: str = ""
    head_dim: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    position_table: bool = True
    position_offset: int = 0
    plain_attention: bool = True
    shared_bias: bool = False
    shared: bool = False
    disentangled: bool = False
    modern: bool = False
    decoder: bool = False
    divided: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def gated(self) -> bool:
        """Whether each FFN neuron has a gate: three vectors of weights instead of two."""
        return self.modern or self.decoder

    @property
    def rotated(self) -> bool:
        """Whether queries and keys are rotated by their position, dimension `i` with `i + head_dim / 2`."""
        return self.modern or self.decoder

    @property
    def kinds_of_head(self) -> tuple[str, ...]:
        """Those of `HEADS` that the architecture can have."""
        return ("sequence", "token", "span", "causal" if self.decoder else "mask")


_ABSOLUTE = {"position_embedding_type": "absolute"}
_BERT = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
_LLAMA = ArchitectureSpec(
    types="", kv_heads="num_key_value_heads", head_dim="head_dim", position_table=False, plain_attention=False,
    decoder=True,
)  # fmt: skip
_QWEN = {"vocab_size": 151_936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 32, "intermediate_size": 22_016, "max_position_embeddings": 32_768,
         "tie_word_embeddings": False}  # fmt: skip
ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "bert": ArchitectureSpec(defaults=_BERT, required=_ABSOLUTE),
    "distilbert": ArchitectureSpec(
        "n_layers", "n_heads", "dim", "hidden_dim", types="",
        defaults={"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072,
                  "max_position_embeddings": 512},
    ),
    "roberta": ArchitectureSpec(defaults=_BERT | {"vocab_size": 50265}, required=_ABSOLUTE, position_offset=2),
    "xlm-roberta": ArchitectureSpec(defaults=_BERT, required=_ABSOLUTE, position_offset=2),
    "electra": ArchitectureSpec(
        embedding="embedding_size", required=_ABSOLUTE,
        defaults=_BERT | {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4,
                          "intermediate_size": 1024},
    ),
    "mpnet": ArchitectureSpec(
        types="", relative="relative_attention_num_buckets", position_offset=2, plain_attention=False,
        shared_bias=True,
        defaults=_BERT | {"vocab_size": 30527, "relative_attention_num_buckets": 32},
    ),
    "deberta-v2": ArchitectureSpec(
        embedding="embedding_size", relative="position_buckets", position_table=False, plain_attention=False,
        disentangled=True,
        defaults={"vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
                  "intermediate_size": 6144, "max_position_embeddings": 512, "type_vocab_size": 0,
                  "relative_attention": False, "position_biased_input": True, "share_att_key": False,
                  "pos_att_type": "", "norm_rel_ebd": "none"},
        required={"relative_attention": True, "position_biased_input": False, "share_att_key": True,
                  "pos_att_type": "c2p|p2c", "norm_rel_ebd": "layer_norm", "conv_kernel_size": 0},
    ),
    "albert": ArchitectureSpec(
        embedding="embedding_size", shared=True,
        required=_ABSOLUTE | {"num_hidden_groups": 1, "inner_group_num": 1},
        defaults=_BERT | {"vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096, "num_attention_heads": 64,
                          "intermediate_size": 16384},
    ),
    "modernbert": ArchitectureSpec(
        types="", position_table=False, plain_attention=False, modern=True,
        defaults=_BERT | {"vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152,
                          "max_position_embeddings": 8192},
        required={"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False,
                  "decoder_bias": True},
    ),
    "llama": replace(
        _LLAMA, divided=True, required={"attention_bias": False, "mlp_bias": False},
        defaults={"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "intermediate_size": 11_008, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    ),
    "qwen2": replace(_LLAMA, qkv_bias=True, defaults=_QWEN),
    "qwen3": replace(_LLAMA, qk_norm=True, defaults=_QWEN | {"head_dim": 128}, required={"attention_bias": False}),
}  # fmt: skip
HEADS: dict[str, str] = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "mask": "ForMaskedLM",
    "causal": "ForCausalLM",
}
"""The kinds of head, and how transformers' class names end."""
PRUNED = "pruned_"
"""Prefix of the `model_type` of a checkpoint whose shape no stock config can express."""


class UnsupportedError(HfcompressError):
    """A config whose model can be measured at most: no shape here describes it."""


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attention heads and FFN neurons.

    Attributes:
        bias_columns: MPNet: the columns of the one table of relative positions that its heads read, ascending; empty
            where they are the first.
    """

    heads: int
    ffn: int
    bias_columns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # The length first: the heads may be many, and the columns are none of most architectures.
        if len(self.bias_columns) == self.heads and self.bias_columns == tuple(range(self.heads)):
            object.__setattr__(self, "bias_columns", ())


@dataclass(frozen=True)
class Shape:
    """An encoder, or a decoder, with a head.

    Attributes:
        architecture: A key of `ARCHITECTURES`.
        layers: One entry a layer.
        hidden: Width of the residual stream.
        head_dim: Width of one attention head.
        vocab: Rows of the word-embedding table.
        positions: Rows of the position table; the longest input, where there is none.
        types: Rows of the token-type table (0 where there is none).
        labels: Outputs of the head; those of a mask or causal head are the vocabulary, whatever is said here.
        head: A key of `HEADS`.
        embedding: Width of the word embeddings; 0 where it is the hidden width.
        embedding_rank: Inner width of word embeddings that are a product of two matrices; 0 where they are a table.
        relative: Buckets of relative positions (0 where the attention has none).
        bias_heads: MPNet: columns of the table of relative positions, one for a head of the layers (0 elsewhere).
        group: Query heads that share a key and value head; 1 where each has its own.
        tied: Whether a mask or causal head makes its words with the embeddings' weights.
        linear_bits: Bits a weight of the encoder's linear layers takes when stored.
        embedding_bits: Bits a word-embedding weight takes when stored.
        head_bits: Bits a weight of the head's linear layers (pooler, classifier) takes when stored; 0 where it is any
            other parameter.
        other_bits: Bits any other parameter takes when stored.
        even: Whether `layers` is known layer by layer; where not, only the totals are, since a global ranking decides.
        estimated: Whether sizes are about what they will be, since a budget or a corpus decides.
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
    def keys(self) -> ArchitectureSpec:
        """What the architecture's config calls its parts."""
        return ARCHITECTURES[self.architecture]

    @property
    def usable_positions(self) -> int:
        """The longest input the position table allows, in tokens."""
        return self.positions - self.keys.position_offset

    @property
    def stock(self) -> bool:
        """Whether a stock config can express the shape.

        That takes equal layers with an FFN, heads that fill the hidden width, and word embeddings that are one table.
        Any number of heads will do where the config says their width, if (Llama) it divides the hidden one.
        """
        full = all(x.ffn and self._told(x.heads) for x in self.layers)
        told = not self.bias_heads or self.bias_heads * self.head_dim == self.hidden
        return full and told and len(set(self.layers)) <= 1 and not self.embedding_rank

    def _told(self, heads: int) -> bool:
        """Whether a stock config can say that each layer has so many heads."""
        if self.keys.head_dim:
            return heads > 0 and not (self.keys.divided and self.hidden % heads)
        return heads * self.head_dim == self.hidden

    @property
    def embedding_parameters(self) -> int:
        """All that surrounds the layers.

        These are the tables of words, positions (relative ones too) and token types, their norms, the projection to
        the hidden width, and the norm after ModernBERT's and a decoder's last layer.
        """
        keys, width, hidden = self.keys, self.embedding or self.hidden, self.hidden
        words = self.vocab * self._word_width + self._factor
        tables = words + (self.types + self.positions * keys.position_table) * width
        if keys.modern or keys.decoder:
            return tables + (2 * hidden if keys.modern else hidden)
        if keys.disentangled:
            return tables + self._projection + 2 * self.relative * hidden + 4 * hidden
        bias = hidden if self._projection else 0
        return tables + 2 * width + self._projection + bias + self.relative * self.bias_heads

    @property
    def encoder_parameters(self) -> int:
        """All transformer layers: weights, biases and layer norms, without embeddings, pooler and head."""
        return sum(self._linear_weights(x) + self._layer_vectors(i, x) for i, x in enumerate(self._stored))

    @property
    def head_parameters(self) -> int:
        """Pooler and classifier; what stands before the words of a mask head and their bias (the words are tied)."""
        width, outputs, dense = self._head_sizes
        if self.keys.decoder and self.head in ("sequence", "causal"):
            return 0 if self.head == "causal" and self.tied else width * outputs
        norms = 3 if self.head == "mask" and not self.keys.modern else 1
        vectors = norms * width if dense else 0
        return dense + vectors + outputs + (0 if self.head == "mask" else width * outputs)

    @property
    def parameters(self) -> int:
        """All parameters of the model with its head."""
        return self.embedding_parameters + self.encoder_parameters + self.head_parameters

    @property
    def bytes(self) -> int:
        """Bytes of the stored weights, without the file's own headers."""
        linear = sum(self._linear_weights(x) for x in self._stored) + self._projection + self._factor
        words = self.vocab * self._word_width
        width, outputs, dense = self._head_sizes
        head = dense + width * outputs * (self.head not in ("mask", "causal") or not self.tied)
        rest = self.parameters - linear - words - head
        stored = linear * self.linear_bits + words * self.embedding_bits + head * (self.head_bits or self.other_bits)
        return int((stored + rest * self.other_bits) / 8)

    def macs(self, length: int) -> int:
        """Multiply-accumulates of one sequence of `length` tokens.

        Per head `3 S H d + 2 S² d + S d H`, per FFN neuron `2 S H` (Kwon et al. 2022, arXiv:2204.09656), 3 where the
        FFN is gated; of `3 S H d` two thirds are shared by the queries of a group. With `R` relative positions DeBERTa
        adds `2 R H d + 2 S R d` a head. Attention within a window, or of what went before, counts whole: it is
        computed and masked. The head's linear layers see one token, or each: where each is labelled, and a decoder's.
        """
        s, h, d, r = length, self.hidden, self.head_dim, 2 * self.relative if self.keys.disentangled else 0
        per_head = 2 * s * h * d + 2 * s * s * d + 2 * r * h * d + 2 * s * r * d
        per_group = per_head * self.group + 2 * s * h * d
        per_neuron = (2 + self.keys.gated) * s * h
        width, outputs, dense = self._head_sizes
        read = 1 if self.head == "sequence" and not self.keys.decoder else s
        layers = sum(x.heads // self.group * per_group + x.ffn * per_neuron for x in self.layers)
        return layers + s * (self._projection + self._factor) + read * (dense + width * outputs)

    def with_layers(self, layers: int, heads: int, ffn: int) -> Shape:
        """The same model with `layers` equal layers."""
        return replace(self, layers=(Layer(heads, ffn),) * layers, bias_heads=heads if self.bias_heads else 0)

    @property
    def _stored(self) -> tuple[Layer, ...]:
        return self.layers[:1] if self.keys.shared else self.layers

    @property
    def _word_width(self) -> int:
        """Columns of the word-embedding table."""
        return self.embedding_rank or self.embedding or self.hidden

    @property
    def _factor(self) -> int:
        """Weights of the second matrix of word embeddings that are a product."""
        return self.embedding_rank * (self.embedding or self.hidden)

    @property
    def _projection(self) -> int:
        """Weights between the word embeddings and the first layer."""
        return (self.embedding or self.hidden) * self.hidden if self.embedding or self.keys.shared else 0

    @property
    def _head_sizes(self) -> tuple[int, int, int]:
        """Width of what the outputs are made from, outputs, and weights of the dense layer before (0 for none)."""
        if self.head == "causal":
            return self.hidden, self.vocab, 0
        if self.head == "mask":
            width = self.embedding or self.hidden
            return width, self.vocab, self.hidden * width
        dense = (self.head == "sequence" or self.keys.modern) and not self.keys.decoder
        return self.hidden, self.labels, self.hidden * self.hidden * dense

    def _linear_weights(self, layer: Layer) -> int:
        heads = layer.heads + layer.heads // self.group
        return 2 * self.hidden * heads * self.head_dim + (2 + self.keys.gated) * self.hidden * layer.ffn

    def _layer_vectors(self, index: int, layer: Layer) -> int:
        if self.keys.modern:  # the norm of the embeddings is that of the first layer
            return 2 * self.hidden if index else self.hidden
        if self.keys.decoder:
            biased = (layer.heads + 2 * (layer.heads // self.group)) * self.keys.qkv_bias
            return 2 * self.hidden + (biased + 2 * self.keys.qk_norm) * self.head_dim
        return 3 * layer.heads * self.head_dim + self.hidden + layer.ffn + self.hidden + 4 * self.hidden


def head_of(class_name: str) -> str | None:
    """The kind of head that a transformers class has, by its name; None for one that is no task's."""
    return next((head for head, ending in HEADS.items() if class_name.endswith(ending)), None)


def shape_of(config: Mapping[str, Any], labels: int | None = None, head: str | None = None) -> Shape:
    """The shape that a config.json describes.

    Args:
        config: The file's content; an uneven shape stands in its `per_layer_config`. A key that it leaves out has
            the value that transformers takes.
        labels: Outputs of the head, where the task and not the config decides.
        head: A key of `HEADS`, where the task decides; else the class that the config names does, and a model
            without one is a classifier of sequences.

    Raises:
        UnsupportedError: for an architecture, or a variant of one, that is not supported.
        HfcompressError: for a config without its sizes, or with sizes that no model has.
    """
    named = config.get("model_type") or ""
    kind = str(named).removeprefix(PRUNED)[:100]
    if not kind:
        raise UnsupportedError("the config names no model_type", "use a complete config.json")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(f"the architecture '{kind}' is not supported", did_you_mean(kind, ARCHITECTURES))
    keys = ARCHITECTURES[kind]
    sizes = {**keys.defaults, **config}
    head = head or _own_head(keys, config)
    if head not in keys.kinds_of_head:
        message = f"transformers has no {kind} model '…{HEADS[head]}'"
        raise HfcompressError(message, "name another model, or another type of task")
    _refuse_variants(kind, sizes, {**keys.required, **({"tie_word_embeddings": True} if head == "mask" else {})})
    _require_sizes(kind, keys, sizes)
    hidden, head_dim = sizes[keys.hidden], _head_dim(kind, keys, sizes)
    if keys.disentangled:
        _refuse_variants(kind, sizes, {"attention_head_size": head_dim, "pooler_hidden_size": hidden})
    return Shape(
        architecture=kind,
        layers=tuple(_layers(keys, sizes)),
        hidden=hidden,
        head_dim=head_dim,
        vocab=sizes["vocab_size"],
        positions=sizes["max_position_embeddings"],
        types=sizes.get(keys.types) or 0,
        labels=labels or label_count(config),
        head=head,
        group=sizes[keys.heads] // _kv_heads(kind, keys, sizes),
        tied=head != "causal" or bool(sizes["tie_word_embeddings"]),
        embedding=sizes.get(keys.embedding) or hidden,
        embedding_rank=config.get("embedding_rank") or 0,
        relative=sizes.get(keys.relative) or 0,
        bias_heads=(sizes.get("bias_heads") or sizes[keys.heads]) if keys.shared_bias else 0,
    )


def label_count(config: Mapping[str, Any]) -> int:
    """Outputs of the head that a config.json tells, 2 where it tells none.

    Raises:
        HfcompressError: for labels that are no map, or a number of them that no head has.
    """
    names = config.get("id2label")
    if names is not None and not isinstance(names, Mapping):
        raise HfcompressError(f"the config's id2label is {shown(names)}", "it maps ids to label names")
    count = len(names or {}) or config.get("num_labels")
    if count is None:
        return 2
    if not is_count(count, 1):
        raise HfcompressError(f"the config says num_labels: {shown(count)}", "it takes a whole number above 0")
    require_bound("num_labels" if not names else "id2label with entries", count, "labels")
    return int(count)


def class_name(config: Mapping[str, Any]) -> str:
    """The class that a config.json names first in `architectures`; empty where it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _require_sizes(kind: str, keys: ArchitectureSpec, sizes: Mapping[str, Any]) -> None:
    """Passes where the sizes of a config are whole numbers that a model may have."""
    needed = {
        keys.layers: "layers", keys.heads: "heads", keys.hidden: "width", keys.ffn: "width",
        "vocab_size": "vocabulary", "max_position_embeddings": "positions",
    }  # fmt: skip
    further = {
        keys.types: "types", keys.embedding: "width", keys.relative: "relative", keys.kv_heads: "heads",
        keys.head_dim: "width", "head_dim": "width", "embedding_rank": "width", "bias_heads": "heads",
    }  # fmt: skip
    missing = [key for key in needed if not is_count(sizes.get(key), 1)]
    if missing:
        raise HfcompressError(
            f"the config of this {kind} model has no number above 0 for {', '.join(missing)}",
            "use a complete config.json",
        )
    given = {key: bound for key, bound in further.items() if key and sizes.get(key) is not None}
    wrong = [key for key in given if not is_count(sizes[key])]
    if wrong:
        raise HfcompressError(
            f"the config of this {kind} model says {wrong[0]}: {shown(sizes[wrong[0]])}",
            "it takes a whole number of at least 0",
        )
    for key, bound in {**needed, **given}.items():
        require_bound(key, sizes[key], bound)


def _head_dim(kind: str, keys: ArchitectureSpec, sizes: Mapping[str, Any]) -> int:
    """The width of a head: a pruned config says it, since its heads may no longer fill the hidden width."""
    says = keys.head_dim or str(sizes["model_type"]).startswith(PRUNED)
    if says and sizes.get("head_dim"):
        return int(sizes["head_dim"])
    if sizes[keys.hidden] % sizes[keys.heads]:
        raise HfcompressError(
            f"the config of this {kind} model has {sizes[keys.heads]} heads, which do not divide {sizes[keys.hidden]}",
            f"fix {keys.heads} or {keys.hidden} in config.json",
        )
    return int(sizes[keys.hidden] // sizes[keys.heads])


def _kv_heads(kind: str, keys: ArchitectureSpec, sizes: Mapping[str, Any]) -> int:
    """Key and value heads; as many as heads where the config says none."""
    heads = sizes[keys.heads]
    count = sizes.get(keys.kv_heads) or heads
    if heads % count:
        raise HfcompressError(
            f"the config of this {kind} model has {heads} heads, which {count} key and value heads do not divide",
            f"fix {keys.heads} or {keys.kv_heads} in config.json",
        )
    return int(count)


def _own_head(keys: ArchitectureSpec, config: Mapping[str, Any]) -> str:
    """The head of the class that a config names, where it is one of the architecture's; else that of sequences."""
    head = head_of(class_name(config))
    return head if head in keys.kinds_of_head else "sequence"


def _layers(keys: ArchitectureSpec, sizes: Mapping[str, Any]) -> Iterator[Layer]:
    overrides = _overrides(keys, sizes)
    for index in range(sizes[keys.layers]):
        own = overrides.get(index, {})
        heads, ffn = (own.get(key, sizes[key]) for key in (keys.heads, keys.ffn))
        yield Layer(heads, ffn, tuple(own.get("kept_heads", ())))


def _overrides(keys: ArchitectureSpec, sizes: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """What `per_layer_config` says of each layer, by its index.

    Raises:
        HfcompressError: where that is nothing a layer can be.
    """
    told = sizes.get("per_layer_config") or {}
    if not isinstance(told, Mapping):
        raise _not_layers(shown(told))
    found = {}
    for index, layer in told.items():
        number = int(index) if str(index).isascii() and str(index).isdigit() and len(str(index)) < 6 else -1
        if not 0 <= number < sizes[keys.layers] or not isinstance(layer, Mapping):
            raise _not_layers(f"{shown(index)}: {shown(layer)}")
        heads, ffn = (layer.get(key, sizes[key]) for key in (keys.heads, keys.ffn))
        columns = layer.get("kept_heads", [])
        fits = is_count(heads) and is_count(ffn) and heads <= LARGEST["heads"] and ffn <= LARGEST["width"]
        named = isinstance(columns, list) and all(is_count(c) and c <= LARGEST["heads"] for c in columns)
        if not fits or not named or len(columns) > heads:
            raise _not_layers(f"{shown(index)}: {shown(layer)}")
        found[number] = layer
    return found


def _not_layers(found: str) -> HfcompressError:
    return HfcompressError(
        f"the config's per_layer_config says {found}, which is no size of one of its layers",
        "use the config.json that was saved with the weights",
    )


def _refuse_variants(kind: str, sizes: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    fix = "name another model; this one can be measured, not taken apart"
    for key, value in required.items():
        found = sizes.get(key, value)
        if _parts(found) != _parts(value):
            told = found[:60] if isinstance(found, str) else shown(found)
            message = f"this {kind} model has `{key}: {told}`, and only `{key}: {value}` is supported"
            raise UnsupportedError(message, fix)
    relative = ARCHITECTURES[kind].relative
    if relative and not is_count(sizes.get(relative), 1):
        raise UnsupportedError(f"this {kind} model has no `{relative}`", fix)


def _parts(value: Any) -> Any:
    """A config value without regard to order: DeBERTa's lists are also written as `p2c|c2p`."""
    parts = value.lower().split("|") if isinstance(value, str) else value
    return sorted(str(part).strip() for part in parts) if isinstance(parts, list) else value


def config_of(shape: Shape, base: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of `shape`, everything that is not the shape (activations, dropout, labels) taken from `base`.

    A shape that no stock config can express keeps nominal sizes at the top, which the stock constructor takes (heads
    that fill the hidden width, or one; those of the widest layer, where the config says their width; the widest FFN),
    says the width of a head in `head_dim`, and in `per_layer_config` what each layer really has.
    """
    keys = shape.keys
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
    if shape.keys.head_dim:
        return max((layer.heads for layer in shape.layers), default=0) or shape.group
    return shape.hidden // shape.head_dim if shape.hidden % shape.head_dim == 0 else 1


_PRUNED_KEYS = ("per_layer_config", "head_dim", "bias_heads", "embedding_rank", "auto_map")


def _pruned_sizes(shape: Shape) -> dict[str, Any]:
    """What only a pruned config says."""
    keys = shape.keys
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
    """The sizes that only some architectures have, and what follows from a size and stands in `base` all the same."""
    keys, kinds = shape.keys, base.get("layer_types") or [""]
    sizes = {
        keys.types: shape.types,
        keys.embedding: shape.embedding or shape.hidden,
        keys.relative: shape.relative,
        keys.kv_heads: _nominal_heads(shape) // shape.group,
        keys.head_dim: shape.head_dim,
    }
    follows = {
        "pooler_hidden_size": shape.hidden,
        "attention_head_size": shape.head_dim,
        "layer_types": [kinds[i % len(kinds)] for i in range(len(shape.layers))],
        # -1 stands for max_position_embeddings: with fewer, the rows of the table would stand for other distances.
        "max_relative_positions": max(base.get("max_relative_positions", 0), 0) or base.get("max_position_embeddings"),
    }
    return {key: value for key, value in sizes.items() if key} | {k: v for k, v in follows.items() if base.get(k)}
