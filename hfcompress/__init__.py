"""hfcompress: make a Hugging Face transformer small, fast and cheap, and prove it."""

from __future__ import annotations

import importlib
from typing import Any

import wrapt

__version__ = "0.1.0"


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
