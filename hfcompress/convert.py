"""Pruned checkpoints of older tools made into ones that load again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.base.errors import HfcompressError
from hfcompress.base.files import new_directory
from hfcompress.base.shape import HEADS, PRUNED, Shape, shape_of
from hfcompress.data.source import model_directory
from hfcompress.measure.verify import verify
from hfcompress.model.artifact import (
    load_tokenizer,
    open_artifact,
    read_config,
    require_weights,
    save_model,
    save_weights,
)
from hfcompress.model.idle import without_idle_units
from hfcompress.model.legacy import rebuild
from hfcompress.model.probe import logits_of, probe_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Converted:
    """What a conversion came to.

    Attributes:
        nominal: The shape that the old config tells.
        shape: The shape of the result.
        idle: Heads (groups of them, where queries share keys) and neurons that were there and did nothing.
        left_out: Tensors of the old checkpoint that are no part of the model.
        bound: The most that a logit may differ; 0 where the conversion is exact.
        tokenizer: Whether there was one.
    """

    nominal: Shape
    shape: Shape
    idle: tuple[int, int]
    left_out: tuple[str, ...]
    bound: float
    tokenizer: bool = True


def convert(source: str, target: Path, base: str | None = None) -> Converted:
    """Writes a checkpoint that loads again, and proves it in a fresh process.

    Three kinds are read, from safetensors alone: of transformers 4 with `pruned_heads`; with tensors smaller than
    their config says, or without those of whole blocks (TextPruner; CoFi, Xia et al. 2022, arXiv:2204.00408); of full
    size, with zeros (nn_pruning, Lagunas et al. 2021, arXiv:2109.04838).

    Args:
        source: The old checkpoint, a directory or Hub id.
        target: The directory to write; it must not exist.
        base: A directory or Hub id with the config and tokenizer, where the old checkpoint lacks them.

    Raises:
        HfcompressError: for what cannot be read, and where there is nothing to convert.
    """
    if target.exists():
        raise HfcompressError(f"{target} exists, and is left as it is", "give another name")
    folders = [model_directory(spec) for spec in (source, base) if spec is not None]
    small, converted = pruned_model(folders)
    tokenizer = _tokenizer(folders)
    with new_directory(target) as partial:
        if tokenizer is None:
            save_weights(small, partial)
        else:
            save_model(small, tokenizer, partial)
        expected = logits_of(small, probe_inputs(partial))
        verify(open_artifact(partial), expected, "AutoModel" + HEADS[converted.shape.head])
    return replace(converted, tokenizer=tokenizer is not None)


def pruned_model(folders: Sequence[Path]) -> tuple[PreTrainedModel, Converted]:
    """The model that `convert` writes, in eval mode, and what it came to.

    Args:
        folders: The old checkpoint, and where to look for a config that it lacks.

    Raises:
        HfcompressError: for what cannot be read, and where there is nothing to convert.
    """
    require_weights(folders[0])
    rebuilt = rebuild(_config(folders), _read(folders[0]))
    small, idle = without_idle_units(rebuilt.model)
    shape = shape_of(small.config.to_dict(), head=rebuilt.nominal.head)
    if shape == rebuilt.nominal:
        raise HfcompressError(f"nothing of {folders[0]} was pruned: it is as its config says", "use it as it is")
    return small, Converted(rebuilt.nominal, shape, idle, rebuilt.left_out, rebuilt.bound)


def _config(folders: Sequence[Path]) -> dict[str, Any]:
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        raise HfcompressError(f"{folders[0]} holds no config.json", "name the model that was pruned with --base")
    config = read_config(found)
    if str(config.get("model_type", "")).startswith(PRUNED):
        raise HfcompressError(f"{found} is a model as hfcompress writes them", "use it as it is")
    return config


def _tokenizer(folders: Sequence[Path]) -> PreTrainedTokenizerBase | None:
    found = next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZERS)), None)
    return load_tokenizer(found) if found else None


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, in float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise HfcompressError(f"{folder} holds no safetensors", "an ONNX graph is not converted")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise HfcompressError(f"{file} does not load: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def summary(converted: Converted) -> list[str]:
    """What a conversion came to, in words."""
    old, new = converted.nominal, converted.shape
    lines = [
        f"layers {len(old.layers)} -> {len(new.layers)}, hidden {old.hidden} -> {new.hidden}, "
        f"parameters {old.parameters:,} -> {new.parameters:,}",
        f"heads by layer {_listed(x.heads for x in new.layers)}; neurons {_listed(x.ffn for x in new.layers)}",
    ]
    if any(converted.idle):
        lines.append(f"{converted.idle[0]} heads and {converted.idle[1]} neurons gave nothing, and are gone")
    if converted.left_out:
        lines.append(f"left out, as no part of the model: {', '.join(converted.left_out)}")
    if converted.bound:
        lines.append(
            f"not exact: the classifier's dense layer had more outputs than the hidden width; a logit may differ by up "
            f"to {converted.bound:.2g}"
        )
    if not converted.tokenizer:
        lines.append("no tokenizer was found, so none is beside the model: name one with --base")
    return lines


def _listed(counts: Iterable[int]) -> str:
    return ", ".join(map(str, counts))
