"""Converts a pruned checkpoint of another tool to a model that loads again."""

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
from hfcompress.pruning.convert.idle_units import cut_idle_units
from hfcompress.pruning.convert.pickles import read_tensors, write_safetensors
from hfcompress.pruning.convert.rebuild import rebuild
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.files import new_directory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        nominal: The shape in the old config.
        shape: The shape of the new model.
        idle: Numbers of head groups and neurons that did nothing and were cut.
        left_out: Names of the tensors of the old checkpoint that are no part of the model.
        bound: The largest possible difference of a logit; 0 if the conversion is exact.
        tokenizer: True if the checkpoint has a tokenizer.
    """

    nominal: Shape
    shape: Shape
    idle: tuple[int, int]
    left_out: tuple[str, ...]
    bound: float
    tokenizer: bool = True


class NothingPrunedError(HfcompressError):
    """Nothing of the checkpoint was pruned: its tensors have the sizes that its config gives."""


def convert(source: str, target: Path, base: str | None = None, allow_pickle: bool = False) -> Conversion | None:
    """Converts a pruned checkpoint to a model that loads again, and checks this in a fresh process.

    Three kinds of checkpoints are known:

    - with `pruned_heads` in the config (transformers 4);
    - with tensors smaller than the config says, or without those of whole blocks (TextPruner; CoFi, Xia et al. 2022,
      arXiv:2204.00408);
    - of full size, with zeros (nn_pruning, Lagunas et al. 2021, arXiv:2109.04838).

    Safetensors are read. Pickles are read if this is allowed: their tensors alone, and no code in them runs.

    Args:
        source: The old checkpoint, a directory or Hub id.
        target: The directory to write; it must not exist.
        base: A directory or Hub id with the config and tokenizer, if the old checkpoint lacks them.
        allow_pickle: True to read pickles, with torch's `weights_only`. If nothing of a pickle was pruned, its tensors
            are written unchanged as safetensors.

    Returns:
        The result; None if the tensors were written unchanged.

    Raises:
        HfcompressError: if the checkpoint cannot be read, or there is nothing to convert.
    """
    if target.exists():
        raise HfcompressError(f"{target} exists already", "give another name")
    directory = pickled_directory if allow_pickle else model_directory
    folders = [directory(source), *([model_directory(base)] if base is not None else [])]
    weights, pickled = read_tensors(folders[0], allow_pickle)
    config, tokenizer = _find_config(folders), _find_tokenizer(folders)
    with new_directory(target) as partial:
        result = _write_model(folders[0], config, weights, pickled, tokenizer, partial)
    return result and replace(result, tokenizer=tokenizer is not None)


def _write_model(
    source: Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    pickled: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    target: Path,
) -> Conversion | None:
    """Writes the rebuilt model, or the tensors of an unpruned pickle, and checks that a fresh process loads it."""
    try:
        if pickled and task_head_of(class_name_of(config)) is None:
            raise NothingPrunedError(f"the config of {source} names no class with a head")
        small, result = rebuild_pruned(source, config, weights)
    except (NothingPrunedError, UnsupportedError):
        if not pickled:
            raise
        write_safetensors(weights, config, target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        # Loading is the check: it refuses tensors that are missing or of another size.
        ModelProcess(
            open_artifact(target), "AutoModel" + TASK_HEADS.get(task_head_of(class_name_of(config)) or "", "")
        ).close()
        return None
    if tokenizer is None:
        save_weights(small, target)
    else:
        save_model(small, tokenizer, target)
    expected = logits_of(small, make_dummy_inputs(target))
    verify(open_artifact(target), expected, "AutoModel" + TASK_HEADS[result.shape.head])
    return result


def rebuild_pruned(
    source: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, Conversion]:
    """Rebuilds the model of a pruned checkpoint in float32, without the units that do nothing.

    Args:
        source: The checkpoint, for messages.
        config: Its config.
        weights: Its tensors by name.

    Returns:
        The model in eval mode, and the result of the conversion.

    Raises:
        HfcompressError: if the tensors make no model, or nothing was pruned.
    """
    rebuilt = rebuild(config, {n: t.float() if t.is_floating_point() else t for n, t in weights.items()})
    small, idle = cut_idle_units(rebuilt.model)
    shape = shape_of(small.config.to_dict(), head=rebuilt.nominal.head)
    if shape == rebuilt.nominal:
        raise NothingPrunedError(
            f"nothing of {source} was pruned: its tensors have the sizes that its config gives", "use it as it is"
        )
    return small, Conversion(rebuilt.nominal, shape, idle, rebuilt.left_out, rebuilt.bound)


def _find_config(folders: Sequence[Path]) -> dict[str, Any]:
    found = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if found is None:
        raise HfcompressError(f"{folders[0]} holds no config.json", "name the model that was pruned with --base")
    config = read_config(found)
    if str(config.get("model_type", "")).startswith(PRUNED):
        raise HfcompressError(f"{found} is already a model of hfcompress", "use it as it is")
    return config


def _find_tokenizer(folders: Sequence[Path]) -> PreTrainedTokenizerBase | None:
    found = next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZERS)), None)
    return load_tokenizer(found) if found else None


def summarize(result: Conversion | None) -> list[str]:
    """Describes the result of a conversion, line by line."""
    if result is None:
        return ["nothing was pruned: the tensors are unchanged, in safetensors"]
    old, new = result.nominal, result.shape
    lines = [
        f"layers {len(old.layers)} -> {len(new.layers)}, hidden {old.hidden} -> {new.hidden}, "
        f"parameters {old.parameters:,} -> {new.parameters:,}",
        f"heads by layer {_join(x.heads for x in new.layers)}; neurons {_join(x.ffn for x in new.layers)}",
    ]
    if any(result.idle):
        lines.append(f"{result.idle[0]} heads and {result.idle[1]} neurons did nothing and were cut")
    if result.left_out:
        lines.append(f"left out, because they are no part of the model: {', '.join(result.left_out)}")
    if result.bound:
        lines.append(
            f"not exact: the classifier's dense layer had more outputs than the hidden width; a logit may differ by up "
            f"to {result.bound:.2g}"
        )
    if not result.tokenizer:
        lines.append("no tokenizer was found, so the model has none: name one with --base")
    return lines


def _join(counts: Iterable[int]) -> str:
    return ", ".join(map(str, counts))
