"""float16: half the bytes, fast on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import (
    NEWER,
    OLDER,
    UNMEASURED_ARM,
    UNMEASURED_GPU,
    UNMEASURED_PROCESSOR,
    Note,
    has_avx512,
    has_only_avx2,
    lacks_tensor_cores,
)
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel


class Float16(Backend):
    """Stores and computes everything in IEEE half precision: half the bytes, fast on GPUs, slow on most CPUs."""

    source: ClassVar[str] = "https://pytorch.org/docs/stable/tensors.html"
    dtype: ClassVar[str] = "float16"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, f"measured 3.1 to 4.1 times slower {OLDER}"),
        Note(has_avx512, f"measured 1.5 to 4.1 times slower {NEWER}"),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("float16"),
        UNMEASURED_GPU,
    )

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        import torch

        from hfcompress.models.artifact import STORED_AS, load_model, save_weights
        from hfcompress.models.linears import linears
        from hfcompress.models.odd_weights import require_finite

        model = load_model(job.source, job.auto_class)
        require_finite(linears(model))
        model = model.to(getattr(torch, self.dtype))
        require_finite(linears(model))  # the largest float16 is 65504
        setattr(model.config, STORED_AS, self.dtype)
        save_weights(model, job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs))
