"""LoRA: adds adapters to a model, saves them, merges them into the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from hfcompress.models.adapters import PEFT_PREFIX, WEIGHTS, require_peft
from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.bounds import LARGEST
from hfcompress.models.weight_axes import part_of
from hfcompress.utils.errors import HfcompressError, Problem
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Target = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]


class Lora(StrictModel):
    """Trains low-rank adapters, `W x + (alpha / r) B A x` with frozen W; all weights of the task head are trained.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685. Needs `hfcompress[peft]`.
    """

    r: int = Field(default=8, ge=1, le=LARGEST["width"])
    """The rank of the adapters."""
    alpha: float = Field(default=16.0, gt=0)
    """The scale of the adapters: their output is multiplied by `alpha / r`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of an adapter."""
    targets: list[Target] = Field(default=["query", "value"], min_length=1)
    """The linear layers that get an adapter: any of query, key, value, attention_output, ffn_in, ffn_out. If one linear
    layer computes query, key and value together, one of these names stands for all three."""
    init: Literal["default", "loftq"] = "default"
    """The start of the adapters: an update of zero (`default`), or the best low-rank fit of the quantization error
    (`loftq`, Li et al. 2023, arXiv:2310.08659), for adapters on a quantized model."""
    iterations: int = Field(default=1, ge=1)
    """Rounds of LoftQ: each quantizes the rest that the adapters leave, and fits the adapters again."""

    @model_validator(mode="after")
    def _refuse_unused(self) -> Lora:
        if self.init != "loftq" and self.says("iterations"):
            raise ValueError("`iterations` is for `init: loftq`; leave it out")
        return self


def init_problems(options: Lora | None) -> list[Problem]:
    """Reports a start of the adapters that a float model cannot have; the keys are paths inside `lora:`."""
    if options is None or options.init == "default":
        return []
    message = "`loftq` starts from the quantization error of the weights, but these weights stay in float32"
    return [Problem(message, "leave it out, or quantize with bnb_4bit and `train: {lora: …}`", ("init",))]


def add_lora(model: PreTrainedModel, options: Lora) -> PreTrainedModel:
    """Adds adapters to the model, in place; then only they and the task head are trained.

    The model keeps its class, its `forward` and the paths of its modules, and at first computes the same.

    Raises:
        HfcompressError: if peft is not installed, or the task head is quantized.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(find_targets(model, options)),
    )
    inject_adapter_in_model(config, model)
    # A fill-mask head shares the weights of the word embeddings, under another name.
    names = list(model.named_parameters(remove_duplicate=False))
    body = {id(parameter) for name, parameter in names if part_of(name, model) != "head"}
    for name, parameter in names:
        if id(parameter) in body:
            continue
        if not parameter.is_floating_point():
            raise HfcompressError(
                f"the task head's {name.removesuffix('.weight')} is quantized, "
                "and a task head is trained whole beside adapters",
                "leave `skip` out of the backend, or name the task head's modules there too",
            )
        parameter.requires_grad_(True)
    return model


def find_targets(model: PreTrainedModel, options: Lora) -> dict[str, nn.Module]:
    """Finds the linear layers that get adapters, by their paths in a model without adapters."""
    modules = spec_of(model).modules
    parts = [layer.get_submodule(getattr(modules, name)) for layer in layers_of(model) for name in options.targets]
    wanted = {id(part) for part in parts if part.weight.numel()}  # type: ignore[operator,union-attr]
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def save_adapter(model: PreTrainedModel, path: Path) -> None:
    """Writes a model's adapters as peft does, but without the name of the base, so that both can be moved together."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    (config,) = model.peft_config.values()
    config.save_pretrained(str(path))
    adapters = {f"{PEFT_PREFIX}{name}": t.detach().cpu() for name, t in get_peft_model_state_dict(model).items()}
    save_file(adapters, path / WEIGHTS, metadata={"format": "pt"})


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merges the adapters into the weights, in place: the model is stock again, and all its weights can be trained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, module.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True)
