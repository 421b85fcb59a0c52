"""The architectures that hfcompress can change: one table with one entry for each; no torch is imported.

An entry has the names of the sizes in config.json (`ConfigKeys`), the paths of the modules (`ModulePaths`), and the
traits in which the architecture differs from BERT. To support another architecture, add an entry here and its parts to
`modeling_pruned.PARTS`, which travels with saved weights and therefore imports nothing from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import nn

TASK_HEADS: dict[str, str] = {
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "mask": "ForMaskedLM",
    "causal": "ForCausalLM",
}
"""The kinds of task head, and the ends of the names of transformers' classes with such a head."""
PRUNED = "pruned_"
"""Prefix of the `model_type` of a checkpoint whose shape no stock config can express."""
OWN_METHOD = "hfcompress_"
"""Prefix of the `quant_method` of layers that hfcompress registers with transformers, such as `hfcompress_int8`."""


class UnsupportedError(HfcompressError):
    """An error for a model that hfcompress can measure but not change: no shape describes it."""


@dataclass(frozen=True)
class ConfigKeys:
    """The names of the model's sizes in an architecture's config.json.

    Attributes:
        token_types: Rows of the token-type table; empty for an architecture without one.
        embedding: Width of the word embeddings; only for an architecture in which it may differ from the hidden width.
        relative: Buckets of relative positions; only for an attention that has them.
        kv_heads: Key and value heads; only for an architecture in which several query heads may share one.
        head_dim: Width of a head; only for a config that has it. The heads then need not fill the hidden width.
        defaults: The values that transformers uses for keys that are missing in config.json.
        required: Values that decide which weights the model has. A config with another value is refused.
    """

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    token_types: str = "type_vocab_size"
    embedding: str = ""
    relative: str = ""
    kv_heads: str = ""
    head_dim: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModulePaths:
    """The paths of a model's modules.

    Attributes:
        layers: The list of transformer layers, as a path from the base model (without the task head). It has one entry
            if all layers share their weights.
        query, key, value: Linear layers, as paths from a transformer layer. A single linear layer that computes all
            three side by side is named three times. The rows of one head come after those of another.
        attention_output: The linear layer that mixes the outputs of the heads. Head `h` feeds its input columns
            `h*head_dim … (h+1)*head_dim`.
        ffn_in, ffn_out: The linear layers of the FFN; neuron `j` is row `j` of the first and column `j` of the second.
        ffn_gate: The linear layer that gates the neurons, for a gated FFN; the same as `ffn_in` if a single linear
            layer computes both side by side.
        task_heads: The modules of each kind of task head, pooler included. They stay in full precision when the rest is
            quantized. A path starts at the base model if it exists there, else at the model.
    """

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    task_heads: Mapping[str, tuple[str, ...]]
    ffn_gate: str = ""

    @property
    def head_rows(self) -> Mapping[str, int]:
        """The linear layers whose rows belong to heads, and the number of parts (query, key, value) in each."""
        return Counter((self.query, self.key, self.value))

    @property
    def neuron_rows(self) -> Mapping[str, int]:
        """The linear layers whose rows belong to FFN neurons, and the number of parts (value, gate) in each."""
        return Counter(path for path in (self.ffn_in, self.ffn_gate) if path)


@dataclass(frozen=True)
class ArchitectureSpec:
    """The description of an architecture. Without traits it is like BERT.

    Attributes:
        keys: The names of the sizes in config.json.
        modules: The paths of the modules.
        position_table: True if each position has an embedding of its own.
        position_offset: Rows of the position table that no token uses (RoBERTa's padding index).
        plain_attention: True if the attention scores are `Q Kᵀ / √d` of the linear layers' outputs: no relative
            positions, no rotation.
        shared_position_bias: MPNet: every layer adds the same table of relative positions, with a column for each head.
        shared_layers: ALBERT: all layers have the same weights, and the word embeddings always pass through a
            projection.
        disentangled: DeBERTa: a table of relative positions goes through the queries and keys of every layer; the norm
            of the embeddings follows their projection, which has no bias.
        modern: ModernBERT: the FFN is gated, a norm stands before each block and after the last layer, no layer has a
            bias, and every kind of task head has the dense layer and the norm.
        decoder: Llama: layers like ModernBERT's, but with separate linear layers and a causal mask. The task head is
            one linear layer, which reads every token. There is no bias except in the task head, and except for
            `qkv_bias`.
        heads_divide_hidden: Llama: transformers refuses a number of heads that does not divide the hidden width, even
            if the config says `head_dim`.
        qkv_bias: Qwen2: queries, keys and values have biases.
        qk_norm: Qwen3: queries and keys are normalized, head by head.
    """

    keys: ConfigKeys
    modules: ModulePaths
    position_table: bool = True
    position_offset: int = 0
    plain_attention: bool = True
    shared_position_bias: bool = False
    shared_layers: bool = False
    disentangled: bool = False
    modern: bool = False
    decoder: bool = False
    heads_divide_hidden: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def gated_ffn(self) -> bool:
        """True if each FFN neuron has a gate: three vectors of weights instead of two."""
        return self.modern or self.decoder

    @property
    def rotary(self) -> bool:
        """True if queries and keys are rotated by their position, dimension `i` with `i + head_dim / 2`."""
        return self.modern or self.decoder

    @property
    def task_head_kinds(self) -> tuple[str, ...]:
        """The keys of `TASK_HEADS` that the architecture can have."""
        return ("sequence", "token", "span", "causal" if self.decoder else "mask")


def _encoder_heads(sequence: tuple[str, ...], mask: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"sequence": sequence, "token": ("classifier",), "span": ("qa_outputs",), "mask": mask}


_BERT_SIZES = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
               "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
_QWEN_SIZES = {"vocab_size": 151_936, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 32, "intermediate_size": 22_016, "max_position_embeddings": 32_768,
               "tie_word_embeddings": False}  # fmt: skip
_ABSOLUTE = {"position_embedding_type": "absolute"}

_BERT = ArchitectureSpec(
    keys=ConfigKeys(defaults=_BERT_SIZES, required=_ABSOLUTE),
    modules=ModulePaths(
        layers="encoder.layer",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        attention_output="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        task_heads=_encoder_heads(("pooler", "classifier"), ("cls",)),
    ),
)
_ROBERTA = ArchitectureSpec(
    keys=ConfigKeys(defaults=_BERT_SIZES | {"vocab_size": 50265}, required=_ABSOLUTE),
    modules=replace(_BERT.modules, task_heads=_encoder_heads(("classifier",), ("lm_head",))),
    position_offset=2,
)
_ELECTRA = ArchitectureSpec(
    keys=ConfigKeys(
        embedding="embedding_size",
        defaults=_BERT_SIZES
        | {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024},
        required=_ABSOLUTE,
    ),
    modules=replace(
        _BERT.modules, task_heads=_encoder_heads(("classifier",), ("generator_predictions", "generator_lm_head"))
    ),
)
_MPNET = ArchitectureSpec(
    keys=ConfigKeys(
        token_types="",
        relative="relative_attention_num_buckets",
        defaults=_BERT_SIZES | {"vocab_size": 30527, "relative_attention_num_buckets": 32},
    ),
    modules=replace(
        _ROBERTA.modules,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
    ),
    position_offset=2,
    plain_attention=False,
    shared_position_bias=True,
)
_DEBERTA = ArchitectureSpec(
    keys=ConfigKeys(
        embedding="embedding_size",
        relative="position_buckets",
        defaults={
            "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 24,
            "intermediate_size": 6144, "max_position_embeddings": 512, "type_vocab_size": 0,
            "relative_attention": False, "position_biased_input": True, "share_att_key": False, "pos_att_type": "",
            "norm_rel_ebd": "none",
        },
        required={
            "relative_attention": True, "position_biased_input": False, "share_att_key": True,
            "pos_att_type": "c2p|p2c", "norm_rel_ebd": "layer_norm", "conv_kernel_size": 0,
        },
    ),
    modules=replace(
        _BERT.modules,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        task_heads=_encoder_heads(("pooler", "classifier"), ("cls", "lm_predictions")),
    ),
    position_table=False,
    plain_attention=False,
    disentangled=True,
)  # fmt: skip
_DISTILBERT = ArchitectureSpec(
    keys=ConfigKeys(
        layers="n_layers",
        heads="n_heads",
        hidden="dim",
        ffn="hidden_dim",
        token_types="",
        defaults={"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072,
                  "max_position_embeddings": 512},
    ),
    modules=ModulePaths(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        task_heads=_encoder_heads(
            ("pre_classifier", "classifier"), ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        ),
    ),
)  # fmt: skip
_ALBERT = ArchitectureSpec(
    keys=ConfigKeys(
        embedding="embedding_size",
        defaults=_BERT_SIZES
        | {"vocab_size": 30000, "embedding_size": 128, "hidden_size": 4096, "num_attention_heads": 64,
           "intermediate_size": 16384},
        required=_ABSOLUTE | {"num_hidden_groups": 1, "inner_group_num": 1},
    ),
    modules=ModulePaths(
        layers="encoder.albert_layer_groups.0.albert_layers",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        task_heads=_encoder_heads(("pooler", "classifier"), ("predictions",)),
    ),
    shared_layers=True,
)  # fmt: skip
_MODERNBERT = ArchitectureSpec(
    keys=ConfigKeys(
        token_types="",
        defaults=_BERT_SIZES
        | {"vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152, "max_position_embeddings": 8192},
        required={"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False,
                  "decoder_bias": True},
    ),
    modules=ModulePaths(
        layers="layers",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        ffn_in="mlp.Wi",
        ffn_gate="mlp.Wi",
        ffn_out="mlp.Wo",
        task_heads={
            **dict.fromkeys(("sequence", "token", "span"), ("head", "classifier")),
            "mask": ("head", "decoder"),
        },
    ),
    position_table=False,
    plain_attention=False,
    modern=True,
)  # fmt: skip
_LLAMA = ArchitectureSpec(
    keys=ConfigKeys(
        token_types="",
        kv_heads="num_key_value_heads",
        head_dim="head_dim",
        defaults={"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                  "intermediate_size": 11_008, "max_position_embeddings": 2048, "tie_word_embeddings": False},
        required={"attention_bias": False, "mlp_bias": False},
    ),
    modules=ModulePaths(
        layers="layers",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_output="self_attn.o_proj",
        ffn_gate="mlp.gate_proj",
        ffn_in="mlp.up_proj",
        ffn_out="mlp.down_proj",
        task_heads={"sequence": ("score",), "token": ("score",), "span": ("qa_outputs",), "causal": ("lm_head",)},
    ),
    position_table=False,
    plain_attention=False,
    decoder=True,
    heads_divide_hidden=True,
)  # fmt: skip
_QWEN2 = replace(
    _LLAMA,
    keys=replace(_LLAMA.keys, defaults=_QWEN_SIZES, required={}),
    heads_divide_hidden=False,
    qkv_bias=True,
)
_QWEN3 = replace(
    _QWEN2,
    keys=replace(_QWEN2.keys, defaults=_QWEN_SIZES | {"head_dim": 128}, required={"attention_bias": False}),
    qkv_bias=False,
    qk_norm=True,
)

ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _ROBERTA,
    "xlm-roberta": replace(_ROBERTA, keys=_BERT.keys),
    "electra": _ELECTRA,
    "mpnet": _MPNET,
    "deberta-v2": _DEBERTA,
    "albert": _ALBERT,
    "modernbert": _MODERNBERT,
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
}
"""The architectures by `model_type`, without the prefix `PRUNED`."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """Reads the `model_type` of a config.json, without the prefix `PRUNED`; empty if there is none."""
    return str(config.get("model_type") or "").removeprefix(PRUNED)


def spec_of(model: nn.Module) -> ArchitectureSpec:
    """Finds the architecture of a loaded model."""
    return ARCHITECTURES[architecture_of({"model_type": model.config.model_type})]  # type: ignore[union-attr]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Lists the transformer layers of a model with or without task head; one if all layers share their weights."""
    base: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    return list(base.get_submodule(spec_of(model).modules.layers))


def head_dim_of(config: Any) -> int:
    """Reads the width of an attention head from a loaded model's config.

    If the config does not say it, it is the width with which the heads fill the hidden width.
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def unit_counts(model: nn.Module) -> tuple[list[int], list[int]]:
    """Counts the head groups and the FFN neurons of each transformer layer, by the sizes of its weights."""
    modules, head_dim = spec_of(model).modules, head_dim_of(model.config)

    def rows(layer: Any, path: str, parts: int) -> int:
        return int(layer.get_submodule(path).out_features) // parts

    layers = layers_of(model)
    heads = [rows(layer, modules.key, modules.head_rows[modules.key]) // head_dim for layer in layers]
    return heads, [rows(layer, modules.ffn_in, modules.neuron_rows[modules.ffn_in]) for layer in layers]


def task_head_of(class_name: str) -> str | None:
    """Finds the kind of task head of a transformers class by the class's name; None for a class without one."""
    return next((head for head, ending in TASK_HEADS.items() if class_name.endswith(ending)), None)


def class_name_of(config: Mapping[str, Any]) -> str:
    """Reads the first class that a config.json names in `architectures`; empty if it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
