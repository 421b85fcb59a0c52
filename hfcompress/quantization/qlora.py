"""QLoRA: trains adapters on a quantized model with frozen weights.

Source: Dettmers et al. 2023, arXiv:2305.14314; the start of the adapters: LoftQ, Li et al. 2023, arXiv:2310.08659.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext, StageResult
from hfcompress.distillation.engine import train_student
from hfcompress.models.adapters import WEIGHTS
from hfcompress.models.artifact import (
    Artifact,
    label_ids,
    load_model,
    load_tokenizer,
    read_config,
    save_weights,
)
from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.weights import ADAPTER
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.facts import LoftqError, QuantizationFacts
from hfcompress.quantization.qat.options import QatTraining
from hfcompress.training.lora import Lora, add_lora, find_targets, save_adapter
from hfcompress.utils.distributed import on_main_process, process_state
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_adapters(
    train: QatTraining, backend: Backend, parent: Artifact, context: StageContext, job: QuantizationJob
) -> StageResult:
    """Quantizes the model, trains adapters and task head, and writes model and adapters; called on every process.

    Stock `from_pretrained` then loads `job.target` with the trained task head, and peft's
    `PeftModel.from_pretrained(model, path, subfolder="adapter")` puts the adapters on it.

    Args:
        train: The training, with `lora`.
        backend: A backend whose `trains` is `adapters`.
        parent: The float model, which is the default teacher.
        context: The stage's context.
        job: The model to quantize, and the target directory.

    Raises:
        HfcompressError: if the task head is quantized.
    """
    from transformers import set_seed

    assert train.lora is not None
    tokenizer = load_tokenizer(job.source, context.task)
    base = _quantize_base(train.lora, backend, context, job)
    model = load_quantized_model(base)
    disable_packing(model)
    set_seed(context.seed)  # the adapters are random
    add_lora(model, train.lora)
    loftq = _start_adapters(model, job, train.lora) if train.lora.init == "loftq" else None
    report = train_student(model, train, train, parent, context, tokenizer)
    facts = QuantizationFacts(training=report, loftq=loftq)
    saved = list[StageResult]()

    def save() -> None:
        quantized = _save(model, backend, base, job, context)
        reading = context.save_reading(tokenizer, label_ids(read_config(job.source)))
        size = (job.target / ADAPTER / WEIGHTS).stat().st_size
        found = replace(facts, odd_weights=quantized.odd_weights, adapter_bytes=size)
        saved.append(StageResult(job.target, found.to_json(), quantized.logits, reading))

    on_main_process(save)
    return saved[0] if saved else StageResult(job.target, facts.to_json())


def _quantize_base(options: Lora, backend: Backend, context: StageContext, job: QuantizationJob) -> QuantizationJob:
    """Quantizes the model that adapters are trained on; in LoftQ's later turns, without the part of the adapters.

    Returns:
        The job whose target has the quantized model.
    """
    base = replace(job, target=context.directory / "base")
    residual = replace(base, source=context.directory / "less")

    def write() -> None:
        _quantize(backend, base)
        if options.iterations > 1:  # only for LoftQ
            _save_residual(backend, base, options, residual.source)
            _quantize(backend, residual)

    on_main_process(write)
    return residual if options.iterations > 1 else base


def _quantize(backend: Backend, job: QuantizationJob) -> QuantizedModel:
    """Quantizes into an empty directory."""
    shutil.rmtree(job.target, ignore_errors=True)
    job.target.mkdir(parents=True)
    return backend.quantize(job)


def _save(
    model: PreTrainedModel, backend: Backend, base: QuantizationJob, job: QuantizationJob, context: StageContext
) -> QuantizedModel:
    """Quantizes the model again, with the trained task head, and writes the adapters beside it.

    transformers cannot save a quantized model that it has loaded. Quantizing equal weights again gives equal bytes.
    """
    whole, path = load_model(base.source, job.auto_class), context.directory / "headed"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            whole.get_parameter(name).data.copy_(parameter.detach())
    save_weights(whole, path)
    quantized = _quantize(backend, replace(job, source=path))
    save_adapter(model, job.target / ADAPTER)
    final = load_quantized_model(job)
    final.load_adapter(str(job.target / ADAPTER))
    return replace(quantized, logits=logits_of(final, job.dummy_inputs))


def _save_residual(backend: Backend, job: QuantizationJob, options: Lora, path: Path) -> None:
    """Writes the float model, without the part of LoftQ's adapters in each adapted layer."""
    from hfcompress.quantization.loftq import alternate

    model, quantized = load_model(job.source, job.auto_class), load_quantized_model(job)
    for name, layer in find_targets(model, options).items():
        weight: Any = layer.weight
        if not quantized.get_parameter(f"{name}.weight").is_floating_point():
            weight.data = alternate(weight.data, backend.fake_quantize, options.r, options.iterations)
    save_weights(model, path)


def load_quantized_model(job: QuantizationJob) -> PreTrainedModel:
    """Loads the quantized model as a user would, on this process's device."""
    import torch
    import transformers

    model: PreTrainedModel = getattr(transformers, job.auto_class).from_pretrained(
        job.target, device_map=process_state().device, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.eval()


def disable_packing(model: PreTrainedModel) -> None:
    """Keeps 4-bit layers on a CPU from packing themselves when dev rows are scored.

    A packed layer passes no gradient, and stays packed when the training continues.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _start_adapters(model: PreTrainedModel, job: QuantizationJob, options: Lora) -> LoftqError:
    """Sets the adapters to the best fit of the quantization error."""
    from hfcompress.quantization.loftq import start_adapters

    whole = load_model(job.source, job.auto_class)
    weights: dict[str, Any] = {name: layer.weight for name, layer in find_targets(whole, options).items()}
    error = start_adapters(model, weights, options)
    log.info(
        f"loftq: quantization changed the adapted layers' weights by {error.error_without_adapters:.2%}; "
        f"with their adapters {error.error:.2%} is left"
    )
    return error
