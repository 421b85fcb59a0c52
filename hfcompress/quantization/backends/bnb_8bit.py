"""LLM.int8 by bitsandbytes: int8 weights that save memory, not time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hfcompress.models.architectures import PRUNED, task_head_of
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
from hfcompress.utils.errors import HfcompressError, Problem, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


class Bnb8Bit(Backend):
    """Stores linear layers in int8, with outlier columns in half precision; it saves memory, not time.

    Pooler, classifier and embeddings stay in float32. If embeddings are most of the model, a prune stage with
    `vocabulary: corpus` before this one makes them smaller.
    """

    source: ClassVar[str] = "LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339"
    extra: ClassVar[str] = "bitsandbytes"
    modules: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    keeps_layers: ClassVar[bool] = True
    trains: ClassVar[Literal["", "fake_quantization", "adapters"]] = "adapters"
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, f"measured 1.7 to 2.0 times slower {OLDER}: it saves memory, not time"),
        Note(has_avx512, f"measured 1.3 to 1.5 times slower {NEWER}: it saves memory, not time"),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("int8"),
        UNMEASURED_GPU,
    )

    skip: list[str] | None = None
    """Modules to leave in float32, at any depth; the default is pooler and classifier."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8)

    def config(self, skip: list[str]) -> Any:
        """Returns the `BitsAndBytesConfig`.

        Args:
            skip: The modules to leave in float32, as transformers matches them.
        """
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)

    def require_runnable(self, model: Any) -> None:
        """Checks that this machine's kernels can run the quantized layers."""

    def module_problems(self, model: Any, head_modules: Sequence[str]) -> list[Problem]:
        if self.skip is None:
            return []
        found = find_unknown_modules(self.skip, model)
        left = [name for name in head_modules if not _named_in(name, self.skip)]
        if left and not found:
            message = f"the task head's {left[0]} is quantized, and a task head is trained whole beside adapters"
            fix = "leave `skip` out of the backend, or name the task head's modules there too"
            found.append(Problem(message, fix, ("skip",)))
        return found

    def fake_quantize(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

        rows, scales, _ = int8_vectorwise_quant(weight.half())
        return int8_vectorwise_dequant(rows, scales).to(weight)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        import torch
        import transformers

        from hfcompress.models.architectures import ARCHITECTURES
        from hfcompress.models.artifact import find_missing_config, load_model, read_config, save_weights
        from hfcompress.models.linears import linears

        kind = str(read_config(job.source)["model_type"]).removeprefix(PRUNED)
        skip = self.skip
        if skip is None:
            skip = list(ARCHITECTURES[kind].modules.task_heads[task_head_of(job.auto_class) or "sequence"])
        layers = linears(load_model(job.source, job.auto_class))
        odd = self.find_odd_weights({path: x for path, x in layers.items() if not _named_in(path, skip)}, job)
        model = getattr(transformers, job.auto_class).from_pretrained(
            job.source,
            quantization_config=self.config([*match_at_any_depth(skip), *sorted(job.keep)]),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **find_missing_config(job.source),
        )
        if problems := find_unknown_modules(self.skip or [], model):
            raise HfcompressError(problems)
        self.require_runnable(model)
        save_weights(model.eval(), job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs), odd)


def match_at_any_depth(names: list[str]) -> list[str]:
    """Returns patterns for `llm_int8_skip_modules` that match names at any depth.

    transformers matches a plain name with the start or the end of a path, so `pooler` would miss `bert.pooler.dense`;
    releases before 5 look for the plain name anywhere and know no patterns.
    """
    return [*names, *(rf"(.*\.)?{name}" for name in names)]


def _named_in(path: str, names: list[str]) -> bool:
    """True if a module is one of these, or inside of one."""
    return any(f".{name}." in f".{path}." for name in names)


def find_unknown_modules(names: Sequence[str], model: Any) -> list[Problem]:
    """Returns a problem for each name of `skip` that no module of a model has."""
    paths = [path for path, _ in model.named_modules()]
    ends = {part for path in paths for part in path.split(".")}
    return [
        Problem(f"`skip` names '{name}', and the model has no such module", did_you_mean(name, ends), ("skip", index))
        for index, name in enumerate(names)
        if not any(_named_in(path, [name]) for path in paths)
    ]
