"""A quantize stage in words, for the card: a sentence about what it does, and paragraphs about the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.distillation.wording import describe_training
from hfcompress.models.odd_weights import ODD
from hfcompress.utils.escape import Markdown, code, markdown
from hfcompress.utils.wording import count, significant

if TYPE_CHECKING:
    from hfcompress.quantization.stage import Quantize

SHOWN = 8
"""The most layers whose sensitivity the card lists."""


def describe(stage: Quantize) -> Markdown:
    """Describes what the stage does, in one sentence."""
    backend = stage.backend
    chosen = {key: getattr(backend, key) for key in type(backend).model_fields if key in backend.model_fields_set}
    options = f" with {', '.join(f'{key} {_spell(value)}' for key, value in chosen.items())}" if chosen else ""
    parts = [f"`{backend.name}`{options} ({backend.source})"]
    if training := describe_training(stage.train):
        what = "adapters on the quantized model" if backend.trains == "adapters" else "quantization-aware"
        parts.append(f"training first, {what}: {training}")
    if stage.max_drop is not None:
        parts.append(f"layers left in float32 until at most {stage.max_drop:g} points are lost on the dev split")
    return Markdown(f"**quantize**: {'; '.join(parts)}")


def _spell(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else markdown(value)


def limits(stage: Quantize) -> list[str]:
    """What a user of the model should know about its answers."""
    backend = stage.backend
    if getattr(backend, "mode", "") == "dynamic" or backend.name == "torch_int8":
        return [
            "Activations are quantized by batch: an answer near the border can change with the rows and the padding "
            "beside it."
        ]
    return []


def summarize(facts: Mapping[str, Any]) -> list[Markdown]:
    """Writes the card's paragraphs and tables about the facts that the report keeps."""
    return [Markdown(part) for key, write in _FACTS.items() if key in facts for part in write(facts[key])]


def _mixed(notes: Mapping[str, Any]) -> list[str]:
    metric, kept = notes["metric"], notes["kept"]
    goal = f"At most {notes['max_drop']:g} points of {metric} were to be lost on the dev split"
    came = "that holds" if notes["holds"] else "none of the models tried holds that, and this one loses least"
    left = f"{count(len(kept), 'linear layer')} in float32" if kept else "no linear layer in float32"
    rows = [
        [str(a["keep"]), f"{a['metric']:.4f}", f"{a['drop']:.2f}", significant(a["bytes"] / 1e6)]
        for a in notes["tried"]
    ]
    tried = _table(["layers in float32", f"{metric} on dev", "points lost", "MB"], rows)
    facts = [f"{goal}; {came}, with {left}. Float: {notes['float']:.4f}. What was tried:", tried]
    if notes["layers"]:
        worst = [
            [code(" + ".join(x["layers"]), in_table=True), f"{x['error']:.3f}", f"{x['metric']:.4f}"]
            for x in notes["layers"][:SHOWN]
        ]
        facts += ["Each layer quantized alone, those that disturb the answers most:"]
        facts += [_table(["layer", "relative error of the answers", f"{metric} on a sample of dev"], worst)]
    return facts


def _odd(notes: list[Mapping[str, Any]]) -> list[str]:
    told = "; ".join(f"{code(x['layer'])}: {x['channels']} that {ODD[x['what']]}" for x in notes)
    return [f"Output channels that a grid holds badly, by layer: {told}."]


def _loftq(notes: Mapping[str, Any]) -> list[str]:
    without, left = notes["error_without_adapters"], notes["error"]
    return [
        f"Quantizing moved the adapted weights by {without:.2%}, of which LoftQ's adapters at first left {left:.2%}."
    ]


_FACTS: Mapping[str, Any] = {"mixed": _mixed, "odd_weights": _odd, "loftq": _loftq}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
