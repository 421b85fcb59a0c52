"""What each architecture calls its parts inside the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.models.shape import PRUNED

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Module paths, from the base model (without the head) down.

    Attributes:
        layers: The list of transformer layers; of one that runs again and again where they share their weights.
        query, key, value: Linear layers, from a layer; one path thrice where a single layer makes all three, side by
            side. Each head is as many rows, one head after the other.
        attention_output: The linear layer that mixes the heads' outputs; head `h` feeds its input columns
            `h*head_dim … (h+1)*head_dim`.
        ffn_in, ffn_out: The FFN's linear layers; neuron `j` is row `j` of the first and column `j` of the last.
        ffn_gate: The linear layer that gates the neurons, of a gated FFN; `ffn_in` again where a single layer makes
            both, side by side.
        head_modules: By kind of head, its modules, pooler included; they stay in full precision when the rest is
            quantized. A path is from the base model where it is there, else from the model.
    """

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    head_modules: Mapping[str, tuple[str, ...]]
    ffn_gate: str = ""

    @property
    def head_rows(self) -> Mapping[str, int]:
        """The linear layers whose rows are those of heads, and how many parts lie side by side in each."""
        return Counter((self.query, self.key, self.value))

    @property
    def neuron_rows(self) -> Mapping[str, int]:
        """The linear layers whose rows are those of neurons, and how many parts lie side by side in each."""
        return Counter(path for path in (self.ffn_in, self.ffn_gate) if path)

    def stack(self, model: nn.Module) -> list[nn.Module]:
        """The transformer layers of a model with or without head; shared weights are one layer."""
        base: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
        return list(base.get_submodule(self.layers))


def _heads(sequence: tuple[str, ...], mask: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {"sequence": sequence, "token": ("classifier",), "span": ("qa_outputs",), "mask": mask}


_BERT = Family(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    head_modules=_heads(("pooler", "classifier"), ("cls",)),
)
_LLAMA = Family(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    ffn_gate="mlp.gate_proj",
    ffn_in="mlp.up_proj",
    ffn_out="mlp.down_proj",
    head_modules={"sequence": ("score",), "token": ("score",), "span": ("qa_outputs",), "causal": ("lm_head",)},
)
_ROBERTA = replace(_BERT, head_modules=_heads(("classifier",), ("lm_head",)))
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": replace(_BERT, head_modules=_heads(("classifier",), ("generator_predictions", "generator_lm_head"))),
    "mpnet": replace(
        _ROBERTA,
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_output="attention.attn.o",
    ),
    "deberta-v2": replace(
        _BERT,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        head_modules=_heads(("pooler", "classifier"), ("cls", "lm_predictions")),
    ),
    "distilbert": Family(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        head_modules=_heads(
            ("pre_classifier", "classifier"), ("vocab_transform", "vocab_layer_norm", "vocab_projector")
        ),
    ),
    "albert": Family(
        layers="encoder.albert_layer_groups.0.albert_layers",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        attention_output="attention.dense",
        ffn_in="ffn",
        ffn_out="ffn_output",
        head_modules=_heads(("pooler", "classifier"), ("predictions",)),
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "modernbert": Family(
        layers="layers",
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        attention_output="attn.Wo",
        ffn_in="mlp.Wi",
        ffn_gate="mlp.Wi",
        ffn_out="mlp.Wo",
        head_modules={
            **dict.fromkeys(("sequence", "token", "span"), ("head", "classifier")),
            "mask": ("head", "decoder"),
        },
    ),
}


def head_dim_of(config: Any) -> int:
    """The width of a head, by a loaded model's config: what it says, else what lets the heads fill the hidden width."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model."""
    return FAMILIES[str(model.config.model_type).removeprefix(PRUNED)]  # type: ignore[union-attr]


def unit_counts(model: nn.Module) -> tuple[list[int], list[int]]:
    """Head groups and neurons of each layer's weights, read from the tensors."""
    family, head_dim = family_of(model), head_dim_of(model.config)

    def rows(layer: Any, path: str, parts: int) -> int:
        return int(layer.get_submodule(path).out_features) // parts

    stack = family.stack(model)
    heads = [rows(layer, family.key, family.head_rows[family.key]) // head_dim for layer in stack]
    return heads, [rows(layer, family.ffn_in, family.neuron_rows[family.ffn_in]) for layer in stack]
