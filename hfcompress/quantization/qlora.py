"""QLoRA: a quantized model whose weights stay as they are, and adapters on it that are trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, StageResult
from hfcompress.distillation.engine import train_student
from hfcompress.models.adapters import WEIGHTS
from hfcompress.models.artifact import (
    ADAPTER,
    Artifact,
    label_ids,
    load_model,
    load_tokenizer,
    read_config,
    save_weights,
)
from hfcompress.models.dummy_inputs import logits_of
from hfcompress.quantization.backends.base import Backend, Work
from hfcompress.quantization.qat.options import QatTraining
from hfcompress.training.lora import Lora, add_lora, find_targets, save_adapter
from hfcompress.utils.distributed import on_main_process, process_state
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel


def qlora(train: QatTraining, backend: Backend, parent: Artifact, context: StageContext, work: Work) -> StageResult:
    """Quantizes the model, trains adapters and head on it, and writes model and adapters; on every process.

    `work.target` then is what stock `from_pretrained` loads, with the trained head in it, and `adapter/` inside of it
    what peft's `PeftModel.from_pretrained(model, path, subfolder="adapter")` puts on top.

    Source: QLoRA, Dettmers et al. 2023, arXiv:2305.14314; the start of the adapters: LoftQ, Li et al. 2023,
    arXiv:2310.08659.

    Args:
        train: With `lora`.
        backend: Its `trains` says `adapters`.
        parent: The float model, by default the teacher.
        context: The stage's context.
        work: What the backend gets.

    Raises:
        HfcompressError: for a head that is quantized.
    """
    from transformers import set_seed

    assert train.lora is not None
    options, tokenizer = train.lora, load_tokenizer(work.source, context.task)
    first = replace(work, target=context.directory / "base")
    on_main_process(lambda: _quantize(backend, first))
    if options.init == "loftq" and options.iterations > 1:
        less = replace(first, source=context.directory / "less")
        on_main_process(lambda: _leave_to_adapters(backend, first, options, less.source))
        first = less
        on_main_process(lambda: _quantize(backend, first))
    model = _loaded(first)
    _train_exactly(model)
    set_seed(context.seed)  # adapters are drawn
    add_lora(model, options)
    if options.init == "loftq":
        work.facts["loftq"] = _fit(model, work, options)
    work.facts.update(train_student(model, train, train, parent, context, tokenizer))
    saved = list[StageResult]()

    def save() -> None:
        logits = _save(model, backend, first, work, context)
        reading = context.save_reading(tokenizer, label_ids(read_config(work.source)))
        saved.append(StageResult(work.target, work.facts, logits, reading))

    on_main_process(save)
    return saved[0] if saved else StageResult(work.target, work.facts)


def _quantize(backend: Backend, work: Work) -> None:
    shutil.rmtree(work.target, ignore_errors=True)
    work.target.mkdir(parents=True)
    backend.quantize(work)


def _save(model: PreTrainedModel, backend: Backend, first: Work, work: Work, context: StageContext) -> NDArray[Any]:
    """Quantizes the model again, with the trained head, and writes the adapters beside it; returns the logits.

    transformers cannot save a quantized model that it has loaded. The same weights become the same bytes.
    """
    whole, path = load_model(first.source, work.auto_class), context.directory / "headed"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            whole.get_parameter(name).data.copy_(parameter.detach())
    save_weights(whole, path)
    _quantize(backend, replace(work, source=path))
    save_adapter(model, work.target / ADAPTER)
    final = _loaded(work)
    final.load_adapter(str(work.target / ADAPTER))
    work.facts["adapter"] = {"bytes": (work.target / ADAPTER / WEIGHTS).stat().st_size}
    return logits_of(final, work.probe)


def _leave_to_adapters(backend: Backend, work: Work, options: Lora, path: Path) -> None:
    """Writes the float model with, in each adapted layer, what LoftQ's adapters leave to quantize."""
    from hfcompress.quantization.loftq import to_quantize

    model, quantized = load_model(work.source, work.auto_class), _loaded(work)
    for name, layer in find_targets(model, options).items():
        weight: Any = layer.weight
        if not quantized.get_parameter(f"{name}.weight").is_floating_point():
            weight.data = to_quantize(weight.data, backend.rounded, options.r, options.iterations)
    save_weights(model, path)


def _loaded(work: Work) -> PreTrainedModel:
    """The quantized model as a user loads it, on this process's device."""
    import torch
    import transformers

    model: PreTrainedModel = getattr(transformers, work.auto_class).from_pretrained(
        work.target, device_map=process_state().device, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def _train_exactly(model: PreTrainedModel) -> None:
    """Keeps a CPU's 4-bit layers from packing themselves for inference whenever dev rows are scored.

    No gradient goes through a packed layer, and it stays packed when the training goes on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _fit(model: PreTrainedModel, work: Work, options: Lora) -> dict[str, float]:
    """Starts the adapters from what quantizing took; how far off the layers are without and with them."""
    from hfcompress.quantization.loftq import fit

    whole = load_model(work.source, work.auto_class)
    weights: dict[str, Any] = {name: layer.weight for name, layer in find_targets(whole, options).items()}
    without, left = fit(model, weights, options)
    log.info(f"loftq: the adapted layers' quantized weights are {without:.2%} off, with their adapters {left:.2%}")
    return {"error_without_adapters": without, "error": left}
