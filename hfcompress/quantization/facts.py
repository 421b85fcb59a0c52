"""The facts of a quantize stage: what stage.json keeps, and the card's sentences about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hfcompress.models.odd_weights import DESCRIPTIONS, OddWeights
from hfcompress.utils.escape import Markdown, code
from hfcompress.utils.wording import count, significant

SHOWN = 8
"""The most layers whose sensitivity the card lists."""


@dataclass(frozen=True)
class LayerSensitivity:
    """The effect of quantizing only one linear layer, or only layers that the backend joins.

    Attributes:
        layers: Their paths in the model.
        error: `‖z - z'‖ / ‖z‖` of the logits on the judged rows.
        metric: The metric on these rows.
    """

    layers: tuple[str, ...]
    error: float
    metric: float


@dataclass(frozen=True)
class Attempt:
    """One quantized model that was tried.

    Attributes:
        keep: The linear layers that stayed in float32.
        metric: Its metric on the dev split, measured from its directory in a process of its own.
        drop: The points lost against the float model; below 0 if it gained.
        bytes: The size of its weight files.
    """

    keep: tuple[str, ...]
    metric: float
    drop: float
    bytes: int


@dataclass(frozen=True)
class MixedPrecision:
    """The result of the search for layers to leave in float32.

    Attributes:
        metric: The metric's name.
        max_drop: The points that may be lost.
        holds: True if the chosen model loses at most `max_drop` points.
        kept: Its layers in float32.
        tried: All models that were tried, in order.
        layers: The sensitivity of each layer, the largest first; empty if all layers could be quantized at once.
        float: The float model's metric on the dev split.
    """

    metric: str
    max_drop: float
    holds: bool
    kept: tuple[str, ...]
    tried: tuple[Attempt, ...]
    layers: tuple[LayerSensitivity, ...]
    float: float


@dataclass(frozen=True)
class LoftqError:
    """The distance of the quantized weights of the adapted layers from the float weights, as shares of their norm.

    Attributes:
        error_without_adapters: `‖W - Q‖ / ‖W‖`.
        error: `‖W - Q - B A‖ / ‖W‖` before any training.
    """

    error_without_adapters: float
    error: float


@dataclass(frozen=True)
class QuantizationFacts:
    """All facts of a quantize stage.

    Attributes:
        training: The facts of the training: the scores of the model and its teacher on the dev split.
        odd_weights: The layers with output channels that the backend stores badly.
        mixed: The search for layers to leave in float32, under `max_drop`.
        loftq: The error that LoftQ's adapters start with, under `init: loftq`.
        adapter_bytes: The size of the trained adapters.
    """

    training: Mapping[str, Any] = field(default_factory=dict)
    odd_weights: tuple[OddWeights, ...] = ()
    mixed: MixedPrecision | None = None
    loftq: LoftqError | None = None
    adapter_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as stage.json keeps them; those that do not apply are left out."""
        facts = dict(self.training)
        if self.odd_weights:
            facts["odd_weights"] = [asdict(odd) for odd in self.odd_weights]
        if self.mixed is not None:
            tried = [{**asdict(attempt), "keep": len(attempt.keep)} for attempt in self.mixed.tried]
            layers = [{**asdict(layer), "layers": list(layer.layers)} for layer in self.mixed.layers]
            facts["mixed"] = {**asdict(self.mixed), "kept": list(self.mixed.kept), "tried": tried, "layers": layers}
        if self.loftq is not None:
            facts["loftq"] = asdict(self.loftq)
        if self.adapter_bytes is not None:
            facts["adapter"] = {"bytes": self.adapter_bytes}
        return facts


def summarize(facts: Mapping[str, Any]) -> list[Markdown]:
    """Writes the card's paragraphs and tables about the facts that the report keeps."""
    return [Markdown(part) for key, write in _PARAGRAPHS.items() if key in facts for part in write(facts[key])]


def _write_mixed(mixed: Mapping[str, Any]) -> list[str]:
    metric, kept = mixed["metric"], mixed["kept"]
    goal = f"The model may lose at most {mixed['max_drop']:g} points of {metric} on the dev split."
    result = (
        "This one does not lose more"
        if mixed["holds"]
        else "Every model that was tried loses more; this one loses least"
    )
    left = f"{count(len(kept), 'linear layer')} in float32" if kept else "no linear layer in float32"
    rows = [
        [str(a["keep"]), f"{a['metric']:.4f}", f"{a['drop']:.2f}", significant(a["bytes"] / 1e6)]
        for a in mixed["tried"]
    ]
    tried = _table(["layers in float32", f"{metric} on dev", "points lost", "MB"], rows)
    parts = [f"{goal} {result}; it has {left}. The float model has {mixed['float']:.4f}. The models tried:", tried]
    if mixed["layers"]:
        worst = [
            [code(" + ".join(x["layers"]), in_table=True), f"{x['error']:.3f}", f"{x['metric']:.4f}"]
            for x in mixed["layers"][:SHOWN]
        ]
        parts += ["The layers that change the answers most when they alone are quantized:"]
        parts += [_table(["layer", "relative error of the logits", f"{metric} on a sample of dev"], worst)]
    return parts


def _write_odd_weights(found: list[Mapping[str, Any]]) -> list[str]:
    layers = "; ".join(f"{code(x['layer'])}: {x['channels']} that {DESCRIPTIONS[x['what']]}" for x in found)
    return [f"Output channels that the quantized model stores badly, by layer: {layers}."]


def _write_loftq(loftq: Mapping[str, Any]) -> list[str]:
    without, left = loftq["error_without_adapters"], loftq["error"]
    return [
        f"Quantization changed the adapted weights by {without:.2%}; with LoftQ's adapters, before any training, "
        f"{left:.2%} was left."
    ]


_PARAGRAPHS: Mapping[str, Callable[[Any], list[str]]] = {
    "mixed": _write_mixed,
    "odd_weights": _write_odd_weights,
    "loftq": _write_loftq,
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
