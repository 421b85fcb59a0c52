"""Encoders whose layers differ in heads and FFN width, in a file that needs only torch and transformers.

hfcompress copies this file beside the weights of a pruned model, so that it loads with
`AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)`, or with no flag after
`import hfcompress`. The stock modules reshape by `head_dim`, so a layer with fewer heads or neurons is the same layer
with smaller linear layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)

# Per architecture: config keys of (heads, ffn), the layer list below the base model; below a layer (query, key, value),
# attention output, FFN in, FFN out, and the attention module with its attributes for (heads, width).
_BERT = (
    ("num_attention_heads", "intermediate_size"),
    "encoder.layer",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    ("attention.self", "num_attention_heads", "all_head_size"),
)
_PARTS: dict[str, Any] = {
    "pruned_bert": _BERT,
    "pruned_roberta": _BERT,
    "pruned_distilbert": (
        ("n_heads", "hidden_dim"),
        "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        ("attention", "n_heads", "dim"),
    ),
}


class PrunedBertConfig(BertConfig):
    """A BERT config whose `per_layer_config` gives each layer's heads and FFN width."""

    model_type = "pruned_bert"
    # Shadows the property of transformers >= 5.14, which would refuse to read the nominal sizes.
    per_layer_config = None


class PrunedDistilBertConfig(DistilBertConfig):
    """A DistilBERT config whose `per_layer_config` gives each layer's heads and FFN width."""

    model_type = "pruned_distilbert"
    per_layer_config = None


class PrunedRobertaConfig(RobertaConfig):
    """A RoBERTa config whose `per_layer_config` gives each layer's heads and FFN width."""

    model_type = "pruned_roberta"
    per_layer_config = None


def _resize(parent: Any, path: str, *, rows: int | None = None, columns: int | None = None) -> None:
    old = parent.get_submodule(path)
    new = nn.Linear(
        old.in_features if columns is None else columns,
        old.out_features if rows is None else rows,
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    owner, _, name = path.rpartition(".")
    setattr(parent.get_submodule(owner), name, new)


class _Pruned:
    """Builds the stock model, then gives each layer the width that the config says; the weights are loaded after."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        (heads_key, ffn_key), layers, projections, attention_output, ffn_in, ffn_out, sized = _PARTS[config.model_type]
        model: Any = self
        base = getattr(model, model.base_model_prefix, model)
        overrides = {int(index): sizes for index, sizes in (config.per_layer_config or {}).items()}
        head_dim = config.hidden_size // config.num_attention_heads
        for index, layer in enumerate(base.get_submodule(layers)):
            sizes = overrides.get(index, {})
            if heads_key in sizes:
                width = sizes[heads_key] * head_dim
                for path in projections:
                    _resize(layer, path, rows=width)
                _resize(layer, attention_output, columns=width)
                # transformers < 5 reshapes by these; later ones read the tensors.
                attention = layer.get_submodule(sized[0])
                setattr(attention, sized[1], sizes[heads_key])
                setattr(attention, sized[2], width)
            if ffn_key in sizes:
                _resize(layer, ffn_in, rows=sizes[ffn_key])
                _resize(layer, ffn_out, columns=sizes[ffn_key])


class PrunedBertModel(_Pruned, BertModel):
    config_class = PrunedBertConfig


class PrunedBertForSequenceClassification(_Pruned, BertForSequenceClassification):
    config_class = PrunedBertConfig


class PrunedBertForTokenClassification(_Pruned, BertForTokenClassification):
    config_class = PrunedBertConfig


class PrunedBertForQuestionAnswering(_Pruned, BertForQuestionAnswering):
    config_class = PrunedBertConfig


class PrunedBertForMaskedLM(_Pruned, BertForMaskedLM):
    config_class = PrunedBertConfig


class PrunedDistilBertModel(_Pruned, DistilBertModel):
    config_class = PrunedDistilBertConfig


class PrunedDistilBertForSequenceClassification(_Pruned, DistilBertForSequenceClassification):
    config_class = PrunedDistilBertConfig


class PrunedDistilBertForTokenClassification(_Pruned, DistilBertForTokenClassification):
    config_class = PrunedDistilBertConfig


class PrunedDistilBertForQuestionAnswering(_Pruned, DistilBertForQuestionAnswering):
    config_class = PrunedDistilBertConfig


class PrunedDistilBertForMaskedLM(_Pruned, DistilBertForMaskedLM):
    config_class = PrunedDistilBertConfig


class PrunedRobertaModel(_Pruned, RobertaModel):
    config_class = PrunedRobertaConfig


class PrunedRobertaForSequenceClassification(_Pruned, RobertaForSequenceClassification):
    config_class = PrunedRobertaConfig


class PrunedRobertaForTokenClassification(_Pruned, RobertaForTokenClassification):
    config_class = PrunedRobertaConfig


class PrunedRobertaForQuestionAnswering(_Pruned, RobertaForQuestionAnswering):
    config_class = PrunedRobertaConfig


class PrunedRobertaForMaskedLM(_Pruned, RobertaForMaskedLM):
    config_class = PrunedRobertaConfig


def _register() -> None:
    """Teaches the Auto classes these models, so that no flag is needed to load one."""
    heads = {
        AutoModel: "Model",
        AutoModelForSequenceClassification: "ForSequenceClassification",
        AutoModelForTokenClassification: "ForTokenClassification",
        AutoModelForQuestionAnswering: "ForQuestionAnswering",
        AutoModelForMaskedLM: "ForMaskedLM",
    }
    for name, config in (
        ("PrunedBert", PrunedBertConfig),
        ("PrunedDistilBert", PrunedDistilBertConfig),
        ("PrunedRoberta", PrunedRobertaConfig),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, head in heads.items():
            auto.register(config, globals()[name + head], exist_ok=True)


if __name__ == "hfcompress.model.pruned":  # not the copy that stands beside a checkpoint
    _register()
