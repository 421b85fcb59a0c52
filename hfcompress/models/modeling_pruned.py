"""Models with uneven layers or factorized word embeddings, in a file that needs only torch and transformers.

hfcompress copies this file beside the weights of a pruned model, so that it loads with
`AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)`, or with no flag after
`import hfcompress`. A class `PrunedX` is the stock class `X`, but its layers have the widths in the config; it is made
at the first use.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

_NUMBERS = ("num_attention_heads", "intermediate_size")
_BERT: dict[str, Any] = {
    "config": _NUMBERS,
    "layers": "encoder.layer",
    "attention": "attention.self",
    "heads": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "mixed": "attention.output.dense",
    "neurons": ("intermediate.dense",),
    "gathered": "output.dense",
}
_LLAMA: dict[str, Any] = {
    "config": _NUMBERS,
    "layers": "layers",
    "attention": "self_attn",
    "heads": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixed": "self_attn.o_proj",
    "neurons": ("mlp.gate_proj", "mlp.up_proj"),
    "gathered": "mlp.down_proj",
}
PARTS: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "XLMRoberta": _BERT,
    "Electra": _BERT,
    "DebertaV2": {
        **_BERT,
        "heads": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    },
    "MPNet": {
        **_BERT,
        "attention": "attention.attn",
        "heads": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "mixed": "attention.attn.o",
    },
    "DistilBert": {
        "config": ("n_heads", "hidden_dim"),
        "layers": "transformer.layer",
        "attention": "attention",
        "heads": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "mixed": "attention.out_lin",
        "neurons": ("ffn.lin1",),
        "gathered": "ffn.lin2",
    },
    "Albert": {
        "config": _NUMBERS,
        "layers": "encoder.albert_layer_groups.0.albert_layers",
        "attention": "attention",
        "heads": ("attention.query", "attention.key", "attention.value"),
        "mixed": "attention.dense",
        "neurons": ("ffn",),
        "gathered": "ffn_output",
    },
    "ModernBert": {
        "config": _NUMBERS,
        "layers": "layers",
        "attention": "attn",
        "heads": ("attn.Wqkv",) * 3,
        "mixed": "attn.Wo",
        "neurons": ("mlp.Wi",) * 2,
        "gathered": "mlp.Wo",
    },
    "Llama": _LLAMA,
    "Qwen2": _LLAMA,
    "Qwen3": _LLAMA,
}
"""The paths of an architecture's modules, by the prefix of its class names.

`config`: the config keys of heads and FFN width; `layers`: the list of layers, as a path from the base model. The
others are paths from a layer. `attention`: the module that stores its own sizes; `heads`: the linear layers that
compute queries, keys and values, one path three times if one layer computes all three; `mixed`: the linear layer that
reads the outputs of the heads; `neurons`: those that compute the FFN's neurons (and their gates); `gathered`: the one
that reads them.
"""
_ENDINGS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
    "ForCausalLM",
)


def __getattr__(name: str) -> Any:
    """Makes the class `PrunedX` of a stock class or config `X`, once."""
    stock = name.removeprefix("Pruned")
    prefixes = [prefix for prefix in PARTS if stock.removeprefix(prefix) in ("Config", *_ENDINGS)]
    if stock == name or not prefixes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(transformers, stock)
    if stock.endswith("Config"):
        made = type(name, (_Told, base), {"__module__": __name__, "model_type": "pruned_" + base.model_type})
    else:
        told = {"config_class": _class(f"Pruned{prefixes[0]}Config"), "parts": PARTS[prefixes[0]]}
        made = type(name, (_Pruned, base), {"__module__": __name__, **told})
    globals()[name] = made
    return made


def _class(name: str) -> Any:
    return getattr(sys.modules[__name__], name)


class _Told:
    """A stock config with the sizes of each layer in `per_layer_config`.

    Since transformers 5.14, a config with that key does not give its nominal sizes, so in memory it has another key. A
    cache reads its window from the config of each layer; here all layers give the same.
    """

    layer_sizes: Any = None

    @property
    def per_layer_config(self) -> Any:
        return [self] * self.num_hidden_layers  # type: ignore[attr-defined]

    @per_layer_config.setter
    def per_layer_config(self, sizes: dict[str, Any]) -> None:
        self.layer_sizes = sizes

    def to_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return told | ({"per_layer_config": told.pop("layer_sizes")} if "layer_sizes" in told else {})

    def validate(self) -> None:
        """Checks what transformers 5 checks before it writes a config, except that the nominal sizes fit each other."""
        for check in self.__class_validators__:  # type: ignore[attr-defined]
            if check.__name__ != "validate_architecture":
                check(self)


class _Pruned:
    """Builds the stock model, then gives each layer its widths from the config; the weights are loaded later."""

    parts: dict[str, Any]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads it in the source file of a class.
        stock: Any = cls.__bases__[-1]
        return bool(stock._can_set_attn_implementation())

    def __init__(self, config: Any) -> None:
        if hasattr(config, "num_key_value_heads"):
            # A decoder's classes get the model below the task head from AutoModel.
            below = _class(f"{type(config).__name__.removesuffix('Config')}Model")
            transformers.AutoModel.register(type(config), below, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]
        model: Any = self
        base = getattr(model, model.base_model_prefix, model)
        if base is not model and isinstance(base, _Pruned):
            return
        for index, layer in enumerate(base.get_submodule(self.parts["layers"])):
            _narrow(layer, self.parts, config, (config.layer_sizes or {}).get(str(index), {}))
        if getattr(config, "embedding_rank", None):
            base.set_input_embeddings(_Factored(base.get_input_embeddings(), config.embedding_rank))
        if hasattr(config, "bias_heads"):
            table = base.encoder.relative_attention_bias
            base.encoder.relative_attention_bias = nn.Embedding(
                table.num_embeddings, config.bias_heads, device=table.weight.device, dtype=table.weight.dtype
            )


def _narrow(layer: Any, parts: dict[str, Any], config: Any, sizes: dict[str, Any]) -> None:
    """Gives a layer the heads and neurons of its entry in `per_layer_config`."""
    heads, neurons = (sizes.get(key, getattr(config, key)) for key in parts["config"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    rows: Counter[str] = Counter()
    for path, made in zip(parts["heads"], (heads, heads // group, heads // group), strict=True):
        rows[path] += made * head_dim
    for path in parts["neurons"]:
        rows[path] += neurons
    for path, width in rows.items():
        _resize(layer, path, rows=width)
    _resize(layer, parts["mixed"], columns=heads * head_dim)
    _resize(layer, parts["gathered"], columns=neurons)
    attention = layer.get_submodule(parts["attention"])
    _tell(attention, heads, head_dim)
    if hasattr(config, "bias_heads"):
        _read_columns(attention, sizes.get("kept_heads", list(range(heads))))
    if heads == 0:  # many attention modules cannot reshape an empty tensor
        inner = parts["mixed"].removeprefix(parts["attention"] + ".")
        attention.forward = partial(_without_heads, attention, "" if inner == parts["mixed"] else inner)


def _resize(parent: Any, path: str, *, rows: int | None = None, columns: int | None = None) -> None:
    old = parent.get_submodule(path)
    columns, rows = old.in_features if columns is None else columns, old.out_features if rows is None else rows
    kind = nn.Linear if rows and columns else _Empty
    new = kind(columns, rows, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    owner, _, name = path.rpartition(".")
    setattr(parent.get_submodule(owner), name, new)


class _Empty(nn.Module):
    """A linear layer without inputs or outputs; quantizers, exporters and initializers cannot handle a real one."""

    def __init__(self, in_features: int, out_features: int, bias: bool, **place: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # A distributed run would wait for the gradient of a weight that is never used.
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, **place), requires_grad=out_features > 0) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        given = inputs.new_zeros(*inputs.shape[:-1], self.out_features)
        return given if self.bias is None else given + self.bias


class _Factored(nn.Module):
    """Word embeddings as the product of a narrow table and a linear layer."""

    def __init__(self, table: nn.Embedding, rank: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": table.weight.device, "dtype": table.weight.dtype}
        self.table = nn.Embedding(table.num_embeddings, rank, padding_idx=table.padding_idx, **place)
        self.projection = nn.Linear(rank, table.embedding_dim, bias=False, **place)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.projection(self.table(ids))


def _tell(attention: Any, heads: int, head_dim: int) -> None:
    """Sets the sizes that an attention module stores; their names differ by architecture and version."""
    sizes = {
        **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), heads),
        **dict.fromkeys(("all_head_size", "dim"), heads * head_dim),
        **dict.fromkeys(("attention_head_size", "head_dim"), head_dim),
        "scaling": head_dim**-0.5,
    }
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)


def _read_columns(attention: Any, columns: list[int]) -> None:
    """For MPNet: lets each head read its own column of the biases that all layers share."""
    place = list(inspect.signature(attention.forward).parameters).index("position_bias")

    def read(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*inputs[:place], inputs[place][:, columns], *inputs[place + 1 :])

    attention.register_forward_pre_hook(read)


def _without_heads(attention: Any, mixed: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Computes the output of an attention module without heads; `mixed` is the path of its output layer, if any.

    ALBERT's module also adds its output to the residual stream.
    """
    stream = next(iter((*args, *kwargs.values())))
    given = stream.new_zeros(*stream.shape[:-1], 0)
    if mixed:
        given = attention.get_submodule(mixed)(given)
    if kwargs.get("past_key_values") is not None:
        # A layer's cache is asked for the number of tokens read, so it must store something.
        told = stream.new_zeros(len(stream), 1, stream.shape[1], 1)
        kwargs["past_key_values"].update(told, told, attention.layer_idx)
    if hasattr(attention, "LayerNorm"):
        given = attention.LayerNorm(stream + attention.output_dropout(given))
    return given, None


def _register() -> None:
    """Registers these models with the Auto classes, so that no flag is needed to load one."""
    for prefix in PARTS:
        config = _class(f"Pruned{prefix}Config")
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for ending in filter(lambda ending: hasattr(transformers, prefix + ending), _ENDINGS):
            auto = getattr(transformers, "AutoModel" + ending.removeprefix("Model"))
            auto.register(config, _class(f"Pruned{prefix}{ending}"), exist_ok=True)


if __name__ == "hfcompress.models.modeling_pruned":  # not the copy that stands beside a checkpoint
    _register()
