"""Reads the tensors of a checkpoint, also from pickles if this is allowed; no code in a pickle runs."""

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
"""The beginnings of the names of pickles that hold the state of a training and no model."""
_INNER = ("state_dict", "model_state_dict", "model")
"""The keys under which some tools put the tensors of a model."""
_RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""The names of a norm's weights in checkpoints that came from TensorFlow, and in PyTorch."""


def read_tensors(folder: Path, allow_pickle: bool = False) -> tuple[dict[str, Tensor], bool]:
    """Reads all tensors of a directory; also returns True if they were in pickles.

    Args:
        folder: The checkpoint.
        allow_pickle: True to read a pickle if there are no safetensors, with torch's `weights_only`.

    Raises:
        HfcompressError: if the checkpoint cannot be read, or is a pickle and that is not allowed.
    """
    names = names_in(folder)
    pickled = allow_pickle and not {WHOLE, INDEX} & set(names)
    files = _find_pickles(folder, names) if pickled else weight_files(folder)
    if not pickled and choose(names, str(folder)).runtime != "torch":
        raise HfcompressError(f"{folder} holds no safetensors", "ONNX and OpenVINO graphs cannot be converted")
    weights: dict[str, Tensor] = {}
    for name in files:
        weights |= _read_pickle(folder / name) if pickled else _read_safetensors(folder / name)
    return weights, pickled


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise HfcompressError(f"{file} does not load: {error}") from error


def _find_pickles(folder: Path, names: list[str]) -> list[str]:
    """Finds the pickles of a model: the usual one, the shards of an index, or the only one in the folder."""
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
        raise HfcompressError(f"{folder} {what}", f"rename the one with the model to {_WHOLE}")
    return found


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a pickle, under the names that transformers gives them."""
    import pickle

    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HfcompressError(
            f"{file} holds more than tensors, or is cut off: {reason}",
            "no code in it was run; if you trust it, load it with the tool that wrote it and save the state_dict() of "
            "its model alone",
        ) from None
    for key in _INNER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise HfcompressError(f"{file} holds no tensors by name", "save the state_dict() of the model")
    odd = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd:
        raise HfcompressError(
            f"{file}: {str(odd[0])[:60]!r} is not a tensor", "save the state_dict() of the model alone"
        )
    return {_rename(name): tensor for name, tensor in content.items()}


def _rename(name: str) -> str:
    found = next((old for old in _RENAMED if name.endswith(old)), None)
    return name.removesuffix(found) + _RENAMED[found] if found else name


def write_safetensors(weights: Mapping[str, Tensor], config: Mapping[str, Any], target: Path) -> None:
    """Writes tensors and their config; tensors that share their storage are written once."""
    from huggingface_hub import save_torch_state_dict

    target.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(weights), target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
