"""LoRA: a student trained through adapters, and a peft checkpoint made into a stock model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from hfcompress.base.bounds import LARGEST
from hfcompress.base.component import Strict
from hfcompress.base.errors import HfcompressError, Problem
from hfcompress.base.lock import shared_directory
from hfcompress.model.artifact import load_model, load_tokenizer, save_model
from hfcompress.model.axes import part_of
from hfcompress.model.family import family_of
from hfcompress.model.weights import weight_files

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

EXTRA = "peft"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of every weight that it saves."""
Target = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]


class Lora(Strict):
    """Training through low-rank adapters: `W x + (alpha / r) B A x` with W frozen; the head is trained whole.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685. Needs `hfcompress[peft]`.
    """

    r: int = Field(default=8, ge=1, le=LARGEST["width"])
    """Rank of the adapters."""
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On what goes into an adapter."""
    targets: list[Target] = Field(default=["query", "value"], min_length=1)
    """The linear layers of each layer that get one: any of query, key, value, attention_output, ffn_in, ffn_out. Where
    a single layer makes query, key and value, one of the names stands for all."""
    init: Literal["default", "loftq"] = "default"
    """What the adapters start from: `default` is an update of zero; `loftq` (Li et al. 2023, arXiv:2310.08659) the best
    one for what quantizing took from the weights below, so it is for adapters on a quantized model."""
    iterations: int = Field(default=1, ge=1)
    """How often LoftQ quantizes what the adapters leave and fits them anew."""

    @model_validator(mode="after")
    def _used(self) -> Lora:
        if self.init != "loftq" and self.says("iterations"):
            raise ValueError("`iterations` is for `init: loftq`; leave it out")
        return self


def init_problems(options: Lora | None) -> list[Problem]:
    """Why adapters on a float model cannot start as they are told to; keys inside of its `lora:`."""
    if options is None or options.init == "default":
        return []
    message = "`loftq` starts from what quantizing took from the weights, and these stay in float32"
    return [Problem(message, "leave it out, or quantize with bnb_4bit and `train: {lora: …}`", ("init",))]


def missing_modules() -> list[str]:
    """Modules of the extra that are not installed."""
    return [] if importlib.util.find_spec(EXTRA) else [EXTRA]


def require_peft() -> None:
    """Passes where peft is installed.

    Raises:
        HfcompressError: where it is not.
    """
    if missing_modules():
        raise HfcompressError("peft is not installed", f"pip install 'hfcompress[{EXTRA}]'")


def add_lora(model: PreTrainedModel, options: Lora) -> PreTrainedModel:
    """Puts adapters into the model, in place: they and the head can be trained, nothing else.

    The model stays what it was, its forward and the paths to its parts included, and at first answers the same.

    Raises:
        HfcompressError: where peft is not installed, or the head is quantized.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(targets_of(model, options)),
    )
    inject_adapter_in_model(config, model)
    # The words of a mask head are the embeddings', under another name.
    names = list(model.named_parameters(remove_duplicate=False))
    body = {id(parameter) for name, parameter in names if part_of(name, model) != "head"}
    for name, parameter in names:
        if id(parameter) in body:
            continue
        if not parameter.is_floating_point():
            raise HfcompressError(
                f"the head's {name.removesuffix('.weight')} is quantized, and a head is trained whole beside adapters",
                "leave `skip` out of the backend, or name the head's modules there too",
            )
        parameter.requires_grad_(True)
    return model


def targets_of(model: PreTrainedModel, options: Lora) -> dict[str, nn.Module]:
    """The linear layers that get adapters, by their paths in a model without any."""
    family = family_of(model)
    parts = [layer.get_submodule(getattr(family, name)) for layer in family.stack(model) for name in options.targets]
    wanted = {id(part) for part in parts if part.weight.numel()}  # type: ignore[operator,union-attr]
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def save_adapter(model: PreTrainedModel, path: Path) -> None:
    """Writes a model's adapters as peft does; they name no base, so that the directory can be moved with its own."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    (config,) = model.peft_config.values()
    config.save_pretrained(str(path))
    adapters = {f"{PEFT_PREFIX}{name}": t.detach().cpu() for name, t in get_peft_model_state_dict(model).items()}
    save_file(adapters, path / WEIGHTS, metadata={"format": "pt"})


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Adds what the adapters learnt to the weights, in place; the model is stock again, and all of it trainable."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a peft adapter and not a model."""
    return (path / "adapter_config.json").is_file()


def merge_adapter(path: Path, directory: Path, auto_class: str, resolve: Callable[[str], Path]) -> None:
    """Writes a LoRA checkpoint and the model it was trained on as one stock model directory.

    It is written beside `directory` and gets its name once it is whole.

    Args:
        path: What peft's `save_pretrained` wrote: adapter_config.json and safetensors, a tokenizer perhaps.
        directory: Where the model goes.
        auto_class: Such as `AutoModelForSequenceClassification`.
        resolve: The directory of the base model, by the name that adapter_config.json gives it.

    Raises:
        HfcompressError: without peft, for another kind of adapter, pickled weights, a head that was not saved whole,
            or a base that cannot be had.
    """
    require_peft()
    from peft import PeftModel

    base = base_of(path, resolve)
    saved = _saved(path / WEIGHTS)
    labels = _saved_labels(saved, base, auto_class)
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
    """The directory of the model that a LoRA checkpoint was trained on.

    Raises:
        HfcompressError: for another kind of adapter, pickled weights, or a base that cannot be had.
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
            f"{path} holds no {WEIGHTS}", "save it anew with peft's save_pretrained(PATH, safe_serialization=True)"
        )
    fix = f"set base_model_name_or_path in {file} to the directory or Hub id of that model"
    if not name:
        raise HfcompressError(f"{file} does not say which model it was trained on", fix)
    try:
        return resolve(name)
    except HfcompressError as error:
        reasons = "; ".join(problem.message for problem in error.problems)
        raise HfcompressError(
            f"the adapter {path} was trained on '{name}', which cannot be had: {reasons}", fix
        ) from error


def _saved(file: Path) -> dict[str, list[int]]:
    """What a file of weights holds: names, without what peft puts before them, and sizes."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as weights:
        return {
            name.removeprefix(PEFT_PREFIX): list(weights.get_slice(name).get_shape())
            for name in weights.keys()  # noqa: SIM118 - no mapping, though it has keys
        }


def _saved_labels(saved: Mapping[str, list[int]], base: Path, auto_class: str) -> int | None:
    """Outputs of the head that the adapter brings; None where it brings none.

    Which weight tells is seen on an empty model with a number of labels that no other size can be.
    """
    import torch
    import transformers

    if not auto_class.endswith(("SequenceClassification", "TokenClassification")):
        return None
    odd = 100_003
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True)
    config.num_labels = odd
    with torch.device("meta"):
        probe = getattr(transformers, auto_class).from_config(config)
    outputs = [name for name, tensor in probe.state_dict().items() if tensor.shape[0] == odd]
    return next((saved[name][0] for name in outputs if name in saved), None)


def _require_trained_head(model: PreTrainedModel, saved: Mapping[str, list[int]], base: Path, path: Path) -> None:
    """Passes where every weight of the head comes from the adapter or its base: peft saves what it is told to."""
    found = {name for file in weight_files(base) for name in _saved(base / file)} | set(saved)
    head = [name for name, _ in model.named_parameters() if part_of(name, model) == "head"]
    lost = [name for name in head if not {name, name.removeprefix(f"{model.base_model_prefix}.")} & found]
    if lost:
        modules = sorted({name.split(".")[0] for name in lost})
        raise HfcompressError(
            f"neither the adapter {path} nor {base} holds {', '.join(lost)}: the head is not whole",
            f"train the adapter anew with modules_to_save={modules} and what it saves now",
        )
