"""The rules that a quantize stage's options must not break, as a table.

In a message, `{backend}` stands for the backend's name and `{why}` for its own reason. In a fix, `{mixed}` and
`{trainable}` stand for the backends that can do this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.utils.errors import Problem, Rule

if TYPE_CHECKING:
    from hfcompress.quantization.stage import Quantize


def find_contradictions(stage: Quantize) -> list[Problem]:
    """Returns the problems of a stage's options with any model."""
    broken = [rule for rule in RULES if rule.when(stage)]
    if not broken:
        return []
    backends = {name: BACKENDS.get(name) for name in BACKENDS.names()}
    words = {
        "backend": stage.backend.name,
        "why": stage.backend.untrainable(),
        "mixed": ", ".join(name for name, backend in backends.items() if backend.keeps_layers),
        "trainable": ", ".join(name for name, backend in backends.items() if backend.trains),
    }
    return [Problem(rule.message.format(**words), rule.fix.format(**words), rule.key) for rule in broken]


def _trains(stage: Quantize, what: str) -> bool:
    return stage.train is not None and stage.backend.trains == what


def _has_lora(stage: Quantize) -> bool:
    return stage.train is not None and stage.train.lora is not None


def _says_without_fixed_ranges(stage: Quantize, key: str) -> bool:
    train, backend = stage.train, stage.backend
    return train is not None and bool(backend.trains and train.says(key) and not backend.training_ranges)


RULES: tuple[Rule[Quantize], ...] = (
    Rule(
        when=lambda stage: stage.max_drop is not None and not stage.backend.keeps_layers,
        message="{backend} has no way to leave single layers in float32",
        fix="leave `max_drop` out, or use one of {mixed}",
        key=("max_drop",),
    ),
    Rule(
        when=lambda stage: stage.max_drop is None and bool(stage.says("rows")),
        message="`rows` is for `max_drop`",
        fix="leave it out",
        key=("rows",),
    ),
    Rule(
        when=lambda stage: _trains(stage, ""),
        message="a model cannot be trained for {backend}",
        fix="leave `train` out, or use one of {trainable}",
        key=("train",),
    ),
    Rule(
        when=lambda stage: _trains(stage, "adapters") and stage.max_drop is not None,
        message="adapters are trained on one quantized model, and `max_drop` makes several",
        fix="leave one of them out",
        key=("max_drop",),
    ),
    Rule(
        when=lambda stage: _trains(stage, "adapters") and not _has_lora(stage),
        message="the weights of {backend} cannot be trained, and there are no adapters to train on them",
        fix="say `lora: {{r: 8}}`",
        key=("train", "lora"),
    ),
    Rule(
        when=lambda stage: _trains(stage, "fake_quantization") and _has_lora(stage),
        message="quantization-aware training trains all weights, without adapters",
        fix="leave it out, or use bnb_4bit",
        key=("train", "lora"),
    ),
    Rule(
        when=lambda stage: stage.train is not None and bool(stage.backend.untrainable()),
        message="{why}",
        fix="leave `per_channel` or `train` out, or say `mode: static`",
        key=("train",),
    ),
    Rule(
        when=lambda stage: _says_without_fixed_ranges(stage, "ranges"),
        message="`ranges` is for fixed ranges of a layer's inputs, and {backend} has none with these options",
        fix="leave it out, or use onnx_int8 with `mode: static`",
        key=("train", "ranges"),
    ),
    Rule(
        when=lambda stage: _says_without_fixed_ranges(stage, "freeze"),
        message="`freeze` is for fixed ranges of a layer's inputs, and {backend} has none with these options",
        fix="leave it out, or use onnx_int8 with `mode: static`",
        key=("train", "freeze"),
    ),
    Rule(
        when=lambda stage: (
            stage.train is not None
            and bool(stage.backend.training_ranges)
            and stage.train.ranges not in stage.backend.training_ranges
        ),
        message="step sizes are learned for 8-bit weights with one scale for each output channel",
        fix="leave `per_channel` and `reduce_range` out, or say `ranges: ema`",
        key=("train", "ranges"),
    ),
)
