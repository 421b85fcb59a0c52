"""Rebuilds a model from the tensors of a pruned checkpoint, which may not have the sizes that its config gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS, ModulePaths, class_name_of, task_head_of
from hfcompress.models.bounds import shorten
from hfcompress.models.shape import Layer, Shape, shape_of
from hfcompress.models.surgery import empty_model
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

_POOLED = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
}
"""By architecture that CoFi prunes: the dense layer of the sequence classifier, and the layer that reads it."""


@dataclass(frozen=True)
class RebuiltModel:
    """A model rebuilt from tensors.

    Attributes:
        model: The model, in eval mode.
        nominal: The shape in the config.
        left_out: Names of the tensors that are no part of the model.
        bound: The largest possible difference of a logit.
    """

    model: PreTrainedModel
    nominal: Shape
    left_out: tuple[str, ...]
    bound: float


def rebuild(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> RebuiltModel:
    """Rebuilds a model from tensors, in their sizes instead of those in the config.

    Args:
        config: The old config.json.
        weights: The tensors by name.

    Raises:
        HfcompressError: if the tensors make no model of the config's class.
    """
    told = {key: value for key, value in config.items() if key != "pruned_heads"}
    nominal = shape_of(told)
    stock, settings = _find_class(told, nominal)
    checkpoint = _Checkpoint(nominal, stock.base_model_prefix, dict(weights))
    shape = checkpoint.find_shape(_read_pruned_heads(config))
    checkpoint.close_gaps(shape)
    bound = checkpoint.narrow_pooler(shape.hidden)
    model = empty_model(stock.__name__, shape, settings)
    left_out = _fill(model, checkpoint.weights)
    return RebuiltModel(model.eval(), nominal, left_out, bound)


def _read_pruned_heads(config: Mapping[str, Any]) -> dict[int, set[int]]:
    """Reads the cut heads of each layer from a config of transformers 4."""
    told = config.get("pruned_heads") or {}
    try:
        return {int(index): {int(head) for head in heads} for index, heads in told.items()}
    except (ValueError, TypeError, AttributeError):
        raise HfcompressError(
            f"the config says pruned_heads: {shorten(told)}", "it must map layers, from 0, to lists of heads"
        ) from None


def _find_class(config: Mapping[str, Any], shape: Shape) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Finds the stock class of a checkpoint (the old tool may name its own class), and makes a config of it."""
    import transformers

    name = class_name_of(config)
    head = task_head_of(name)
    if head is None:
        raise HfcompressError(
            f"the config names no class with a task head: architectures is {name or 'missing'}",
            f"it must end in one of {', '.join(TASK_HEADS.values())}; or name the model that was pruned with --base",
        )
    settings = transformers.AutoConfig.for_model(shape.architecture).from_dict(dict(config))
    mapping = getattr(transformers, "AutoModel" + TASK_HEADS[head])._model_mapping
    return mapping[type(settings)], settings


def _fill(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Loads the weights into a model, and returns the names of those that it has no place for."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise HfcompressError(
                f"{name} is {tuple(weights[name].shape)}, and by the other tensors it must be {tuple(tensor.shape)}",
                "if this is not the config of the model that was pruned, put that one beside the weights",
            )
    # Tied weights share their storage, and a checkpoint holds them once.
    given = {tensor.data_ptr() for name, tensor in wanted.items() if name in weights}
    missing = [n for n, t in wanted.items() if n not in weights and t.numel() and t.data_ptr() not in given]
    if missing:
        raise HfcompressError(
            f"the checkpoint lacks {len(missing)} of the weights of {type(model).__name__} ({', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''})",
            "convert a complete checkpoint, with its task head",
        )
    model.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)
    return tuple(sorted(set(weights) - set(wanted)))


class _Checkpoint:
    """The tensors of a pruned checkpoint; finds the shape of its layers, and changes tensors until a model fits."""

    def __init__(self, nominal: Shape, prefix: str, weights: dict[str, Tensor]) -> None:
        self.nominal, self.weights = nominal, weights
        self.modules: ModulePaths = ARCHITECTURES[nominal.architecture].modules
        self.base = f"{prefix}."
        self.layers = f"{self.base}{self.modules.layers}."

    def find_shape(self, cut: Mapping[int, set[int]]) -> Shape:
        """Finds the shape of the tensors; layers without tensors are dropped, and the others are renumbered.

        Args:
            cut: The heads that the config says were cut, by layer.
        """
        stored = 1 if self.nominal.spec.shared_layers else len(self.nominal.layers)
        layers, kept = [], []
        for index in range(stored):
            layer = self._find_layer(index, cut.get(index))
            if layer.heads or layer.ffn:
                layers.append(layer)
                kept.append(index)
        if not layers:
            raise HfcompressError(f"the checkpoint has no tensor of a layer, such as {self.layers}0…")
        self._renumber(kept)
        inside = (name for name in self.weights if name.startswith(self.layers))
        hidden = next(self.weights[name].shape[0] for name in inside if name.endswith(self._readers))
        layers *= len(self.nominal.layers) if self.nominal.spec.shared_layers else 1
        return replace(self.nominal, layers=tuple(layers), hidden=int(hidden))

    @property
    def _readers(self) -> tuple[str, str]:
        """The name endings of the weights that read heads and neurons, and write to the residual stream."""
        return f".{self.modules.attention_output}.weight", f".{self.modules.ffn_out}.weight"

    def _find_layer(self, index: int, cut: set[int] | None) -> Layer:
        widths = [self.weights[n].shape[1] if n in self.weights else 0 for n in self._names(index, self._readers)]
        heads, rest = divmod(widths[0], self.nominal.head_dim)
        if rest:
            raise HfcompressError(
                f"the heads of layer {index + 1} have {widths[0]} dimensions in all, which is no multiple of the head "
                f"width in the config, {self.nominal.head_dim}",
                "only heads that were cut whole can be read",
            )
        nominal = self.nominal.layers[index].heads
        if cut is not None and heads != nominal - len(cut):
            raise HfcompressError(
                f"pruned_heads cuts {len(cut)} of the {nominal} heads of layer {index + 1}, and its tensors have "
                f"{heads} left",
                "correct pruned_heads in config.json",
            )
        if self.nominal.bias_heads and heads < nominal and cut is None:
            raise HfcompressError(
                f"the tensors do not tell which heads of layer {index + 1} are left, and {self.nominal.architecture} "
                "has a position bias for each head",
                "list the cut heads in `pruned_heads` in config.json",
            )
        columns = tuple(head for head in range(nominal) if head not in (cut or ())) if self.nominal.bias_heads else ()
        return Layer(heads, widths[1], columns)

    def _names(self, index: int, endings: Sequence[str]) -> Iterator[str]:
        return (f"{self.layers}{index}{ending}" for ending in endings)

    def _renumber(self, kept: Sequence[int]) -> None:
        numbers, renamed = {str(old): new for new, old in enumerate(kept)}, {}
        for name, tensor in self.weights.items():
            old, _, rest = name.removeprefix(self.layers).partition(".")
            if not name.startswith(self.layers):
                renamed[name] = tensor
            elif old in numbers:
                renamed[f"{self.layers}{numbers[old]}.{rest}"] = tensor
        self.weights = renamed

    def close_gaps(self, shape: Shape) -> None:
        """Adds the tensors of missing blocks, so that these blocks change nothing.

        CoFi skips such a block and the norm behind it. Here the block has no units and its norm stays: a second norm
        changes nothing, up to its epsilon, if the weights of the first one move to it. So the logits are the same; the
        hidden states before the block lack those weights.
        """
        import torch

        last = f"{self.base}embeddings.LayerNorm"
        for index in range(1 if shape.spec.shared_layers else len(shape.layers)):
            for reader in self._names(index, self._readers):
                norm = reader.removesuffix("dense.weight") + "LayerNorm"
                if reader not in self.weights:
                    self._require_known(reader)
                    for part, idle in ((".weight", torch.ones_like), (".bias", torch.zeros_like)):
                        self.weights[norm + part] = self.weights[last + part]
                        self.weights[last + part] = idle(self.weights[last + part])
                    self.weights[reader.replace(".weight", ".bias")] = torch.zeros_like(self.weights[norm + ".bias"])
                last = norm

    def _require_known(self, missing: str) -> None:
        if self.nominal.architecture not in _POOLED:
            raise HfcompressError(
                f"the checkpoint lacks {missing}; {self.nominal.architecture} without this block is not known",
                f"whole blocks may be missing in {', '.join(_POOLED)}",
            )

    def narrow_pooler(self, hidden: int) -> float:
        """Cuts outputs of the classifier's dense layer down to the hidden width, as a config needs it.

        CoFi cuts the dimensions that the layer reads, and none of its outputs. Those with the smallest outgoing weights
        are cut.

        Returns:
            The largest possible difference of a logit: each output comes from a tanh, so it is at most 1.
        """
        dense, reader = _POOLED.get(self.nominal.architecture, ("", ""))
        weight = self.weights.get(f"{dense}.weight")
        if self.nominal.head != "sequence" or weight is None or weight.shape[0] <= hidden:
            return 0.0
        outgoing = self.weights[f"{reader}.weight"]
        order = outgoing.abs().amax(0).argsort(descending=True, stable=True)
        kept, lost = order[:hidden].sort().values, order[hidden:]
        for part in (".weight", ".bias"):
            self.weights[dense + part] = self.weights[dense + part][kept]
        self.weights[f"{reader}.weight"] = outgoing[:, kept]
        return float(outgoing[:, lost].abs().sum(1).max())
