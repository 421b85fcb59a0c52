"""What a machine and a model's config tell before anything runs: what to mind, what can be cut, how it loads again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfcompress.measure.hardware import abilities
from hfcompress.models.architectures import ARCHITECTURES, UnsupportedError
from hfcompress.models.shape import Layer, Shape, shape_of

if TYPE_CHECKING:
    from rich.table import Table

    from hfcompress.recipe.schema import Recipe

STOCK = "stock class"
PRUNED_CLASS = "per_layer_config and modeling file"
GRANULARITIES = (
    "attention heads",
    "FFN neurons",
    "whole layers",
    "attention blocks",
    "FFN blocks",
    "hidden dimensions",
    "vocabulary",
    "single weights",
    "2:4 weights",
)


@dataclass(frozen=True)
class Finding:
    """What holds for one granularity.

    Attributes:
        granularity: What would be cut.
        reload: How the result loads again; empty where nothing can be cut.
        note: Why not, or what to mind.
    """

    granularity: str
    reload: str
    note: str

    @property
    def possible(self) -> bool:
        """Whether it can be cut here."""
        return bool(self.reload)


@dataclass(frozen=True)
class Diagnosis:
    """What a config tells.

    Attributes:
        facts: What the model is, by name.
        findings: One for each of `GRANULARITIES`.
    """

    facts: dict[str, str]
    findings: list[Finding]


def warnings(recipe: Recipe) -> list[str]:
    """What is slow or inaccurate on this machine, of the stages of a recipe."""
    machine = abilities()
    return [f"stages.{i}.{advice}" for i, stage in enumerate(recipe.stages) for advice in stage.advice(machine)]


def examine(config: Mapping[str, Any]) -> Diagnosis:
    """What of a model can be cut, by its config.json.

    An architecture that hfcompress does not know, and weights that can no longer be cut, are told in the findings.

    Raises:
        HfcompressError: for a config without its sizes.
    """
    try:
        shape = shape_of(config)
    except UnsupportedError as error:
        facts = {"architecture": str(config.get("model_type", "none"))}
        return Diagnosis(facts, _nothing(error.problems[0].message))
    reason = _closed(config)
    return Diagnosis(_facts(shape), _nothing(reason) if reason else _findings(shape))


def _closed(config: Mapping[str, Any]) -> str:
    """Why nothing of a supported architecture can be cut; empty where it can."""
    if config.get("quantization_config"):
        return "its weights are quantized: cut the model that it was made from"
    if config.get("pruned_heads"):
        return "transformers 4 cut its heads, and 5 does not load it: `hfcompress convert` does"
    return ""


def _nothing(reason: str) -> list[Finding]:
    return [Finding(granularity, "", reason) for granularity in GRANULARITIES]


def _facts(shape: Shape) -> dict[str, str]:
    heads, modules = [x.heads for x in shape.layers], ARCHITECTURES[shape.architecture].modules
    grouped = f", {shape.group} queries to a key and value" if shape.group > 1 else ""
    made = "one linear layer" if modules.query == modules.key else "three linear layers"
    return {
        "architecture": f"{shape.architecture}, {STOCK if shape.stock else PRUNED_CLASS}",
        "layers": f"{len(shape.layers)}{', all with the same weights' if shape.spec.shared_layers else ''}",
        "attention heads": f"{_span(heads)} of {shape.head_dim}{grouped}; {made} for queries, keys and values",
        "FFN neurons": f"{_widths([x.ffn for x in shape.layers])}{', gated' if modules.ffn_gate else ''}",
        "hidden": _widths([shape.hidden])
        + (f", embeddings of {shape.embedding}, projected" if shape.embedding else ""),
        "vocabulary": f"{shape.vocab:,}",
    }


def _span(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _widths(values: list[int]) -> str:
    """Widths, and the largest power of two up to 64 that divides them all: what hardware likes."""
    step = next(step for step in (64, 32, 16, 8, 4, 2, 1) if not any(value % step for value in values))
    return f"{_span(values)} (multiples of {step})"


def _findings(shape: Shape) -> list[Finding]:
    return [
        _heads(shape),
        _neurons(shape),
        _layers(shape),
        _block(shape, "attention blocks"),
        _block(shape, "FFN blocks"),
        _hidden(shape),
        Finding("vocabulary", _reload(shape), "with a fast tokenizer of WordPiece, Unigram or BPE"),
        Finding("single weights", _reload(shape), "smaller once stored sparse, no faster: dense runtimes gain nothing"),
        _two_of_four(shape),
    ]


def _heads(shape: Shape) -> Finding:
    most = max(x.heads for x in shape.layers)
    what = "groups of heads" if shape.group > 1 else "heads"
    if most <= shape.group:
        return Finding(GRANULARITIES[0], "", f"a layer has one of its {what} alone")
    even = shape.with_layers(len(shape.layers), most - shape.group, max(1, shape.layers[0].ffn))
    note = f"{what}, with all their queries" if shape.group > 1 else ""
    if not even.stock:
        note = "stock where as large a share of the hidden width goes"
    elif shape.spec.heads_divide_hidden:
        note += "; their number must divide the hidden width to be stock"
    return Finding(GRANULARITIES[0], _even_or_not(shape, even), note)


def _neurons(shape: Shape) -> Finding:
    width = max(x.ffn for x in shape.layers)
    if width < 2:
        return Finding(GRANULARITIES[1], "", "the FFN has one neuron")
    even = replace(shape, layers=tuple(replace(x, ffn=width - 1) for x in shape.layers))
    return Finding(GRANULARITIES[1], _even_or_not(shape, even), "")


def _layers(shape: Shape) -> Finding:
    if len(shape.layers) < 2:
        return Finding(GRANULARITIES[2], "", "there is one")
    note = ""
    if shape.spec.shared_layers:
        note = "fewer runs of the one layer: faster, not smaller"
    elif shape.spec.modern:
        note = "the first must stay: it has no norm before its attention"
    return Finding(GRANULARITIES[2], _reload(replace(shape, layers=shape.layers[:-1])), note)


def _block(shape: Shape, granularity: str) -> Finding:
    if shape.spec.shared_layers:
        return Finding(granularity, "", "one layer's weights serve as all: it would go everywhere")
    first = shape.layers[0]
    layer = Layer(0, first.ffn) if granularity.startswith("attention") else replace(first, ffn=0)
    note = "" if shape.spec.modern or shape.spec.decoder else "the block's norm stays"
    return Finding(granularity, _reload(replace(shape, layers=(layer, *shape.layers[1:]))), note)


def _hidden(shape: Shape) -> Finding:
    heads, notes = shape.layers[0].heads, []
    if shape.stock and heads > 1 and not shape.spec.keys.head_dim:
        with_heads = f"{shape.hidden - shape.head_dim} with {heads - 1}"
        notes.append(f"stock where as large a share of the heads goes: {with_heads}")
    if shape.spec.heads_divide_hidden:
        notes.append("the heads must divide what stays to be stock")
    if shape.embedding and not shape.spec.shared_layers:
        notes.append(f"not to {shape.embedding}, the width of the embeddings")
    narrow = replace(shape, hidden=shape.hidden - max(heads, 1))
    return Finding(GRANULARITIES[5], _reload(narrow), "; ".join(notes))


def _two_of_four(shape: Shape) -> Finding:
    widths = {shape.hidden, *(x.heads * shape.head_dim for x in shape.layers), *(x.ffn for x in shape.layers)}
    odd = sorted(width for width in widths if width % 4)
    if odd:
        return Finding(GRANULARITIES[8], "", f"a width of {odd[0]} is no multiple of 4")
    note = "faster on sparse tensor cores alone (NVIDIA, compute capability 8.0)"
    return Finding(GRANULARITIES[8], _reload(shape), note)


def _even_or_not(shape: Shape, even: Shape) -> str:
    """How a model loads that lost the same of each layer, and how where layers differ."""
    if not even.stock or shape.spec.shared_layers:
        return _reload(even)
    return f"even: {STOCK}; uneven: {PRUNED_CLASS}; or ONNX"


def _reload(shape: Shape) -> str:
    return f"{STOCK if shape.stock else PRUNED_CLASS}, or ONNX"


def table(diagnosis: Diagnosis) -> Table:
    """The findings, for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "can be cut", "loads as", "mind"):
        made.add_column(heading, overflow="fold")
    for finding in diagnosis.findings:
        cells = (finding.granularity, "yes" if finding.possible else "no", finding.reload or "-", finding.note or "-")
        made.add_row(*(Text(cell) for cell in cells))
    return made
