"""What each architecture calls its parts inside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.base.shape import PRUNED

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Module paths, from the base model (without the head) down.

    Attributes:
        layers: The list of transformer layers.
        query, key, value: Linear layers, from a layer.
        attention_output: The linear layer that mixes the heads' outputs; head `h` feeds its input columns
            `h*head_dim … (h+1)*head_dim`.
        ffn_in, ffn_out: The FFN's two linear layers; neuron `j` is row `j` of the first and column `j` of the second.
        heads_modules: Modules of a classifier that stay in full precision when the rest is quantized.
    """

    layers: str
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    head_modules: tuple[str, ...]

    def stack(self, model: nn.Module) -> list[nn.Module]:
        """The transformer layers of a model with or without head."""
        base: Any = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
        return list(base.get_submodule(self.layers))


_BERT = Family(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    head_modules=("pooler", "classifier"),
)
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Family(
        layers="transformer.layer",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        head_modules=("pre_classifier", "classifier"),
    ),
}


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model."""
    return FAMILIES[str(model.config.model_type).removeprefix(PRUNED)]  # type: ignore[union-attr]
