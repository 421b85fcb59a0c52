"""Merges a peft adapter and its base model into one stock model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.artifact import load_model, load_tokenizer, save_model
from hfcompress.models.weight_axes import part_of
from hfcompress.models.weights import read_header, weight_files
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.lock import shared_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


EXTRA = "peft"
"""The optional dependencies that adapters need."""
WEIGHTS = "adapter_model.safetensors"


PEFT_PREFIX = "base_model.model."
"""Prefix that peft puts before the name of every weight that it saves."""


def is_adapter(path: Path) -> bool:
    """True if a directory holds a peft adapter and not a model."""
    return (path / "adapter_config.json").is_file()


def merge_adapter(path: Path, directory: Path, auto_class: str, resolve: Callable[[str], Path]) -> None:
    """Writes a LoRA checkpoint and the model it was trained on as one stock model directory.

    It is written beside `directory`, and renamed once it is complete.

    Args:
        path: A directory that peft's `save_pretrained` wrote: adapter_config.json, safetensors, perhaps a tokenizer.
        directory: The directory to write the model to.
        auto_class: The class to load it with, such as `AutoModelForSequenceClassification`.
        resolve: Finds the directory of the base model by the name in adapter_config.json.

    Raises:
        HfcompressError: if peft is missing, for another kind of adapter, for pickled weights, for an incomplete task
            head, or for a base model that cannot be found.
    """
    require_peft()
    from peft import PeftModel

    base = base_of(path, resolve)
    saved = _read_shapes(path / WEIGHTS)
    labels = _count_labels(saved, base, auto_class)
    model = load_model(base, auto_class, fresh_head=bool(labels), **({"num_labels": labels} if labels else {}))
    _require_trained_head(model, saved, base, path)
    try:
        model = PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError) as error:
        raise HfcompressError(f"the adapter {path} does not fit {base}: {str(error).splitlines()[0]}") from error
    owner = path if (path / "tokenizer_config.json").is_file() else base
    with shared_directory(directory) as scratch:
        save_model(model, load_tokenizer(owner), scratch)


def base_of(path: Path, resolve: Callable[[str], Path]) -> Path:
    """Finds the directory of the model that a LoRA checkpoint was trained on.

    Raises:
        HfcompressError: for another kind of adapter, pickled weights, or a base model that cannot be found.
    """
    file = path / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfcompressError(f"{file} is not JSON: {error}") from None
    kind, name = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise HfcompressError(f"{path} is a {kind} adapter", "only LORA adapters can be merged")
    if not (path / WEIGHTS).is_file():
        raise HfcompressError(
            f"{path} holds no {WEIGHTS}", "save it again with peft's save_pretrained(PATH, safe_serialization=True)"
        )
    fix = f"set base_model_name_or_path in {file} to the directory or Hub id of that model"
    if not name:
        raise HfcompressError(f"{file} does not say which model it was trained on", fix)
    try:
        return resolve(name)
    except HfcompressError as error:
        reasons = "; ".join(problem.message for problem in error.problems)
        raise HfcompressError(
            f"the adapter {path} was trained on '{name}', which cannot be found: {reasons}", fix
        ) from error


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of the weights in a file, by their names without peft's prefix."""
    return {name.removeprefix(PEFT_PREFIX): tensor.shape for name, tensor in read_header(file).items()}


def _count_labels(saved: Mapping[str, tuple[int, ...]], base: Path, auto_class: str) -> int | None:
    """Counts the outputs of the task head that the adapter holds; None if it holds none.

    An empty model with an unusual number of labels shows which weights have a row for each output.
    """
    import torch
    import transformers

    if not auto_class.endswith(("SequenceClassification", "TokenClassification")):
        return None
    odd = 100_003
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    config.num_labels = odd
    with torch.device("meta"):
        empty = getattr(transformers, auto_class).from_config(config)
    outputs = [name for name, tensor in empty.state_dict().items() if tensor.shape[0] == odd]
    return next((saved[name][0] for name in outputs if name in saved), None)


def _require_trained_head(model: PreTrainedModel, saved: Mapping[str, tuple[int, ...]], base: Path, path: Path) -> None:
    """Requires every weight of the task head in the adapter or its base: peft saves only the modules it is told to."""
    found = {name for file in weight_files(base) for name in _read_shapes(base / file)} | set(saved)
    head = [name for name, _ in model.named_parameters() if part_of(name, model) == "head"]
    lost = [name for name in head if not {name, name.removeprefix(f"{model.base_model_prefix}.")} & found]
    if lost:
        modules = sorted({name.split(".")[0] for name in lost})
        raise HfcompressError(
            f"neither the adapter {path} nor {base} holds {', '.join(lost)}: the task head is incomplete",
            f"train the adapter again with modules_to_save={modules}, besides what it saves now",
        )


def missing_modules() -> list[str]:
    """Lists the modules of the extra that are not installed."""
    return [] if importlib.util.find_spec(EXTRA) else [EXTRA]


def require_peft() -> None:
    """Checks that peft is installed.

    Raises:
        HfcompressError: if it is not.
    """
    if missing_modules():
        raise HfcompressError("peft is not installed", f"pip install 'hfcompress[{EXTRA}]'")
