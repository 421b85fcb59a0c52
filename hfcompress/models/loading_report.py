"""Reports which weights were found when a model was loaded; the worker runs this file by its path."""

from __future__ import annotations

from typing import Any


def loading_report(model: Any, info: dict[str, Any]) -> dict[str, Any]:
    """Lists, as JSON, the weights that `models/loading_checks.py` checks.

    Args:
        model: The loaded `PreTrainedModel`.
        info: The value that `from_pretrained` returned for `output_loading_info`.
    """
    modules = {name for name, _ in model.named_modules()}
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
        "prefix": model.base_model_prefix,
        "body": [name for name, _ in model.base_model.named_children()],
        # Scales and the like, which a quantized layer loads by itself.
        "beside": sorted(key for key in info["unexpected_keys"] if key.rpartition(".")[0] in modules),
        "not_finite": not_finite(model),
    }


def not_finite(model: Any) -> list[str]:
    """Lists the parameters of a model with values that are NaN or infinite; quantized layers are left out."""
    return [
        name
        for name, weight in model.named_parameters()
        if type(weight.data).__name__ == "Tensor" and weight.is_floating_point() and not weight.isfinite().all()
    ]
