"""LoRA: a student trained through adapters, and a peft checkpoint made into a stock model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from hfcompress.models.adapters import PEFT_PREFIX, WEIGHTS, require_peft
from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.axes import part_of
from hfcompress.models.bounds import LARGEST
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Target = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]


class Lora(StrictModel):
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
    modules = spec_of(model).modules
    parts = [layer.get_submodule(getattr(modules, name)) for layer in layers_of(model) for name in options.targets]
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


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merges the adapters into the weights, in place: the model is stock again, and all of it can be trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)
