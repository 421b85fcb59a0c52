"""The tensors of a checkpoint's files, pickled ones too where that is allowed: no code of a pickle runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.weights import INDEX, PICKLES, WHOLE, choose, names_in, weight_files
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE, _INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "trainer")
"""How the names of pickles begin that hold a training's state and no model."""
_INNER = ("state_dict", "model_state_dict", "model")
"""Keys under which some tools put a model's tensors."""
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""What checkpoints that came from TensorFlow call the parts of a norm."""


def read_tensors(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a directory, and whether they were pickled.

    Args:
        folder: The checkpoint.
        allow_pickle: Read a pickle where there are no safetensors, with torch's `weights_only`.

    Raises:
        HfcompressError: for what cannot be read, or is pickled and not allowed.
    """
    names = names_in(folder)
    pickled = allow_pickle and not {WHOLE, INDEX} & set(names)
    files = _pickles(folder, names) if pickled else weight_files(folder)
    if not pickled and choose(names, str(folder)).runtime != "torch":
        raise HfcompressError(f"{folder} holds no safetensors", "a graph is not converted")
    weights: dict[str, Tensor] = {}
    for name in files:
        weights |= _unpickled(folder / name) if pickled else _loaded(folder / name)
    return weights, pickled


def _loaded(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise HfcompressError(f"{file} does not load: {error}") from error


def _pickles(folder: Path, names: list[str]) -> list[str]:
    """The pickled files of a checkpoint: the usual one, the shards of its index, or the only one that holds a model."""
    if _WHOLE in names:
        return [_WHOLE]
    if _INDEX in names:
        try:
            shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise HfcompressError(f"{folder / _INDEX} is not the index of a model's shards: {error!r}") from None
        lost = [name for name in shards if name not in names]
        if lost:
            raise HfcompressError(f"{folder / _INDEX} names {lost[0]!r}, which {folder} does not hold")
        return shards
    found = [n for n in names if n.endswith(PICKLES) and "/" not in n and not n.startswith(_OF_TRAINING)]
    if len(found) != 1:
        what = f"holds several pickles ({', '.join(found)})" if found else "holds no pickle of a model"
        raise HfcompressError(f"{folder} {what}", f"call the one that is the model {_WHOLE}")
    return found


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, by names as transformers gives them."""
    import pickle

    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfcompressError(
            f"{file} holds more than tensors, or is cut off: {reason}",
            "nothing in it was run; where you trust it, load it with the tool that wrote it and save the state_dict() "
            "of its model alone",
        ) from None
    for key in _INNER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise HfcompressError(f"{file} holds no tensors by name", "save the state_dict() of the model")
    odd = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd:
        raise HfcompressError(f"{file}: {str(odd[0])[:60]!r} is no tensor", "save the state_dict() of the model alone")
    return {_renamed(name): tensor for name, tensor in content.items()}


def _renamed(name: str) -> str:
    found = next((old for old in _RENAMED if name.endswith(old)), None)
    return name.removesuffix(found) + _RENAMED[found] if found else name


def write_safetensors(weights: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> None:
    """Writes tensors as they are, those that share their storage once, and the config beside them."""
    from huggingface_hub import save_torch_state_dict

    target.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(weights), target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
