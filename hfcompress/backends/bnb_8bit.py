"""LLM.int8 through bitsandbytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.backends.base import Backend
from hfcompress.base.shape import Shape
from hfcompress.model.probe import Probe, logits_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Bnb8Bit(Backend):
    """int8 linear layers with outlier columns in half precision; saves memory, not time. Pooler and classifier stay."""

    source: ClassVar[str] = "LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339"
    extra: ClassVar[str] = "bitsandbytes"
    modules: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    skip: list[str] | None = None
    """Modules left in float32; the default is pooler and classifier."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8)

    def options(self, skip: list[str]) -> Any:
        """The `BitsAndBytesConfig`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)

    def quantize(self, source: Path, target: Path, auto_class: str, probe: Probe) -> NDArray[Any]:
        import torch
        import transformers

        from hfcompress.model.artifact import read_config
        from hfcompress.model.family import FAMILIES

        kind = str(read_config(source)["model_type"]).removeprefix("pruned_")
        skip = self.skip if self.skip is not None else list(FAMILIES[kind].head_modules)
        model = getattr(transformers, auto_class).from_pretrained(
            source,
            quantization_config=self.options(skip),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
        )
        model.eval().save_pretrained(target)
        return logits_of(model, probe)
