"""Half precision."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Float16(Backend):
    """Every weight and activation in IEEE half precision: half the bytes; fast on GPUs, slow on most CPUs."""

    source: ClassVar[str] = "https://pytorch.org/docs/stable/tensors.html"
    dtype: ClassVar[str] = "float16"

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=16, embedding_bits=16, other_bits=16)

    def quantize(self, work: Work) -> NDArray[Any]:
        import torch

        from hfcompress.models.artifact import STORED_AS, load_model, save_weights
        from hfcompress.models.linears import linears
        from hfcompress.models.odd_weights import require_finite

        model = load_model(work.source, work.auto_class)
        require_finite(linears(model))
        model = model.to(getattr(torch, self.dtype))
        require_finite(linears(model))  # float16 ends at 65504
        setattr(model.config, STORED_AS, self.dtype)
        save_weights(model, work.target)
        return logits_of(model, work.probe)
