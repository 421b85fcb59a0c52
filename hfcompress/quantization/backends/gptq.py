"""GPTQ: 4-bit weights for decoders on GPUs, rounded in turn so that later weights correct the error of earlier ones."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field, model_validator

from hfcompress.measure.hardware import abilities
from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import UNMEASURED_GPU, Note
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.calibration import iterate_rows
from hfcompress.utils.errors import HfcompressError

PACKED = 32
"""The bits of the integers that weights are packed into; widths must be multiples of it."""


class Gptq(Backend):
    """Stores a decoder's linear layers in 4 bits by second-order rounding, and the rest in float16; for GPUs.

    Optimum rounds the weights; GPTQModel packs and multiplies them. It was tried with tiny models on a CPU, for which
    GPTQModel has plain kernels. It was never run on a GPU, and neither its speed nor its quality was measured.
    """

    source: ClassVar[str] = "GPTQ, Frantar et al. 2023, arXiv:2210.17323"
    extra: ClassVar[str] = "gptq"
    modules: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum.gptq")
    runs_on: ClassVar[tuple[str, ...]] = ("cuda",)
    notes: ClassVar[tuple[Note, ...]] = (UNMEASURED_GPU,)

    group_size: int = Field(default=128, ge=32)
    """The number of inputs that share a scale, a multiple of 32."""
    desc_act: bool = False
    """Round the inputs with the largest activations first: closer to the float model, and slower to run."""
    rows: int = Field(default=128, ge=1)
    """The number of train rows that the rounding is fitted to."""

    @model_validator(mode="after")
    def _require_packed_groups(self) -> Gptq:
        if self.group_size % PACKED:
            raise ValueError(f"`group_size` is {self.group_size}, and weights are packed by {PACKED}: give a multiple")
        return self

    def plan(self, shape: Shape) -> Shape:
        # Each group has a float16 scale and a 4-bit zero point.
        bits = 4 + (16 + 4) / self.group_size
        return replace(shape, linear_bits=bits, head_bits=16, embedding_bits=16, other_bits=16)

    def problems(self, shape: Shape) -> list[str]:
        if not shape.spec.decoder:
            return [f"gptq is for decoders, and {shape.architecture} is an encoder: use bnb_4bit or onnx_int4"]
        layers = shape.layers if shape.even else ()
        inputs = {shape.hidden} | {x.heads * shape.head_dim for x in layers} | {x.ffn for x in layers}
        outputs = {x.heads // shape.group * shape.head_dim for x in layers}
        message = "a linear layer has {} {}, and gptq packs them in multiples of {}"
        return [
            *(message.format(x, "inputs", self.group_size) for x in sorted(inputs) if x % self.group_size),
            *(message.format(x, "outputs", PACKED) for x in sorted(outputs) if x % PACKED),
        ]

    def unavailable(self) -> tuple[str, str] | None:
        if not abilities().gpus:
            return "gptq needs an NVIDIA GPU, and PyTorch has none here", "use onnx_int4 or bnb_4bit"
        return super().unavailable()

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        import torch
        import transformers
        from transformers import GPTQConfig

        from hfcompress.models.artifact import find_missing_config, save_weights

        rows = list(iterate_rows(job.rows(self.rows), ("input_ids", "attention_mask")))
        if not rows:
            raise HfcompressError("there are no rows to fit the rounding to", "give the task a train split")
        model = getattr(transformers, job.auto_class).from_pretrained(
            job.source,
            quantization_config=GPTQConfig(bits=4, dataset=rows, group_size=self.group_size, desc_act=self.desc_act),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.float16,
            use_safetensors=True,
            local_files_only=True,
            **find_missing_config(job.source),
        )
        # The config would publish rows of the train split with the model.
        model.config.quantization_config.dataset = None
        save_weights(model.eval(), job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs))
