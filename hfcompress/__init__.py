"""hfcompress: make a Hugging Face transformer small, fast and cheap, and prove it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hfcompress.api import Recipe as Recipe
    from hfcompress.api import Run as Run
    from hfcompress.api import distill as distill
    from hfcompress.api import evaluate as evaluate
    from hfcompress.api import prune as prune
    from hfcompress.api import quantize as quantize
    from hfcompress.api import search as search
    from hfcompress.data.fill_mask import FillMask as FillMask
    from hfcompress.data.sequence import Regression as Regression
    from hfcompress.data.sequence import TextClassification as TextClassification
    from hfcompress.data.spans import QuestionAnswering as QuestionAnswering
    from hfcompress.data.tokens import TokenClassification as TokenClassification
    from hfcompress.distillation.augmentation.options import Augment as Augment
    from hfcompress.distillation.recovery import Recover as Recover
    from hfcompress.distillation.stage import Distill as Distill
    from hfcompress.distillation.student import Student as Student
    from hfcompress.distillation.teachers import Teachers as Teachers
    from hfcompress.finetuning.stage import Finetune as Finetune
    from hfcompress.measure.measure import Measure as Measure
    from hfcompress.measure.timing import Latency as Latency
    from hfcompress.pruning.budget import Budget as Budget
    from hfcompress.pruning.criteria.base import Criterion as Criterion
    from hfcompress.pruning.stage import Prune as Prune
    from hfcompress.quantization.backends.base import Backend as Backend
    from hfcompress.quantization.qat.options import QatTraining as QatTraining
    from hfcompress.quantization.stage import Quantize as Quantize
    from hfcompress.recipe.schema import Hub as Hub
    from hfcompress.recipe.target import Target as Target
    from hfcompress.report.notebook import Report as Report
    from hfcompress.training.lora import Lora as Lora
    from hfcompress.training.loss import Loss as Loss
    from hfcompress.training.options import Train as Train
    from hfcompress.utils.errors import HfcompressError as HfcompressError

_EXPORTS = {
    "hfcompress.api": ["Recipe", "Run", "distill", "evaluate", "prune", "push", "quantize", "search"],
    "hfcompress.data.fill_mask": ["FillMask"],
    "hfcompress.data.sequence": ["Regression", "TextClassification"],
    "hfcompress.data.spans": ["QuestionAnswering"],
    "hfcompress.data.tokens": ["TokenClassification"],
    "hfcompress.distillation.augmentation.options": ["Augment"],
    "hfcompress.distillation.recovery": ["Recover"],
    "hfcompress.distillation.stage": ["Distill"],
    "hfcompress.distillation.student": ["Student"],
    "hfcompress.distillation.teachers": ["Teachers"],
    "hfcompress.finetuning.stage": ["Finetune"],
    "hfcompress.measure.measure": ["Measure"],
    "hfcompress.measure.timing": ["Latency"],
    "hfcompress.pruning.budget": ["Budget"],
    "hfcompress.pruning.criteria.base": ["Criterion"],
    "hfcompress.pruning.stage": ["Prune"],
    "hfcompress.quantization.backends.base": ["Backend"],
    "hfcompress.quantization.qat.options": ["QatTraining"],
    "hfcompress.quantization.stage": ["Quantize"],
    "hfcompress.recipe.schema": ["Hub"],
    "hfcompress.recipe.target": ["Target"],
    "hfcompress.report.notebook": ["Report"],
    "hfcompress.training.loss": ["Loss"],
    "hfcompress.training.lora": ["Lora"],
    "hfcompress.training.options": ["Train"],
    "hfcompress.utils.errors": ["HfcompressError"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    """Imports what is exported when it is first asked for (PEP 562), so that `import hfcompress` needs no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hfcompress' has no attribute '{name}'")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})


def _wrap_auto_config(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "AutoConfig.from_pretrained", _register_pruned_first)


def _register_pruned_first(wrapped: Any, _instance: Any, args: Any, kwargs: Any) -> Any:
    importlib.import_module("hfcompress.models.modeling_pruned")
    return wrapped(*args, **kwargs)


def _register_int8(_module: Any) -> None:
    importlib.import_module("hfcompress.quantization.int8_modules")


# `import hfcompress` is enough to load a pruned or an int8 checkpoint with transformers' own classes. It costs no
# import of torch: the pruned classes are registered when the first config is read, and never in the middle of
# transformers' own imports; the int8 layers, which need no model of transformers', once it knows quantizers.
wrapt.register_post_import_hook(_wrap_auto_config, "transformers.models.auto.configuration_auto")
wrapt.register_post_import_hook(_register_int8, "transformers.quantizers.auto")
