"""Pruned checkpoints of older tools made into ones that load again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.data.source import model_directory, pickled_directory
from hfcompress.measure.process import ModelProcess
from hfcompress.measure.verify import verify
from hfcompress.models.architectures import PRUNED, TASK_HEADS, UnsupportedError, class_name_of, task_head_of
from hfcompress.models.artifact import load_tokenizer, open_artifact, read_config, save_model, save_weights
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.shape import Shape, shape_of
from hfcompress.pruning.convert.idle_units import without_idle_units
from hfcompress.pruning.convert.pickles import read_tensors, write_safetensors
from hfcompress.pruning.convert.rebuild import rebuild
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import new_directory

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
        tokenizer: True if there was one.
    """

    nominal: Shape
    shape: Shape
    idle: tuple[int, int]
    left_out: tuple[str, ...]
    bound: float
    tokenizer: bool = True


class NothingPrunedError(HfcompressError):
    """A checkpoint that is as its config says."""


def convert(source: str, target: Path, base: str | None = None, allow_pickle: bool = False) -> Converted | None:
    """Writes a checkpoint that loads again, and proves it in a fresh process.

    Three kinds are read: of transformers 4 with `pruned_heads`; with tensors smaller than their config says, or without
    those of whole blocks (TextPruner; CoFi, Xia et al. 2022, arXiv:2204.00408); of full size, with zeros (nn_pruning,
    Lagunas et al. 2021, arXiv:2109.04838). Safetensors are read; pickles where it is allowed, and then their tensors
    alone: no code in them runs.

    Args:
        source: The old checkpoint, a directory or Hub id.
        target: The directory to write; it must not exist.
        base: A directory or Hub id with the config and tokenizer, where the old checkpoint lacks them.
        allow_pickle: Read a pickled checkpoint with torch's `weights_only`; where nothing of it was pruned its tensors
            are written as safetensors as they are.

    Returns:
        What it came to; None where tensors were written as they are.

    Raises:
        HfcompressError: for what cannot be read, and where there is nothing to convert.
    """
    if target.exists():
        raise HfcompressError(f"{target} exists, and is left as it is", "give another name")
    directory = pickled_directory if allow_pickle else model_directory
    folders = [directory(source), *([model_directory(base)] if base is not None else [])]
    weights, pickled = read_tensors(folders[0], allow_pickle)
    config, tokenizer = _config(folders), _tokenizer(folders)
    with new_directory(target) as partial:
        converted = _rebuilt(folders[0], config, weights, pickled, tokenizer, partial)
    return converted and replace(converted, tokenizer=tokenizer is not None)


def _rebuilt(
    source: Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    pickled: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Path,
) -> Converted | None:
    """Writes the model that the tensors make up, or the tensors as they are, and proves it."""
    try:
        if pickled and task_head_of(class_name_of(config)) is None:
            raise NothingPrunedError(f"the config of {source} names no class with a head")
        small, converted = _pruned(source, config, weights)
    except (NothingPrunedError, UnsupportedError):
        if not pickled:
            raise
        write_safetensors(weights, config, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        # Loading proves it: what is missing, or of another size, is refused.
        ModelProcess(
            open_artifact(target), "AutoModel" + TASK_HEADS.get(task_head_of(class_name_of(config)) or "", "")
        ).close()
        return None
    if tokenizer is None:
        save_weights(small, target)
    else:
        save_model(small, tokenizer, target)
    expected = logits_of(small, make_dummy_inputs(target))
    verify(open_artifact(target), expected, "AutoModel" + TASK_HEADS[converted.shape.head])
    return converted


def pruned_model(folders: Sequence[Path]) -> tuple[PreTrainedModel, Converted]:
    """The model that `convert` writes, in eval mode, and what it came to.

    Args:
        folders: The old checkpoint, and where to look for a config that it lacks.

    Raises:
        HfcompressError: for what cannot be read, and where there is nothing to convert.
    """
    return _pruned(folders[0], _config(folders), read_tensors(folders[0])[0])


def _pruned(source: Path, config: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[PreTrainedModel, Converted]:
    rebuilt = rebuild(config, {n: t.float() if t.is_floating_point() else t for n, t in weights.items()})
    small, idle = without_idle_units(rebuilt.model)
    shape = shape_of(small.config.to_dict(), head=rebuilt.nominal.head)
    if shape == rebuilt.nominal:
        raise NothingPrunedError(f"nothing of {source} was pruned: it is as its config says", "use it as it is")
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


def summary(converted: Converted | None) -> list[str]:
    """What a conversion came to, in words."""
    if converted is None:
        return ["nothing was pruned: its tensors are as they were, in safetensors"]
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
