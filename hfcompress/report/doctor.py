"""The checks of `hfcompress doctor`: what is slow on this machine, and what of a model can be cut."""

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
    """A row of the table: one granularity.

    Attributes:
        granularity: One of `GRANULARITIES`.
        reload: How the result loads again; empty if it cannot be cut.
        note: The reason why it cannot be cut, or a condition.
    """

    granularity: str
    reload: str
    note: str

    @property
    def possible(self) -> bool:
        """True if it can be cut."""
        return bool(self.reload)


@dataclass(frozen=True)
class Diagnosis:
    """The result of examining a config.

    Attributes:
        facts: The sizes of the model, by name.
        findings: One for each of `GRANULARITIES`.
    """

    facts: dict[str, str]
    findings: list[Finding]


def list_warnings(recipe: Recipe) -> list[str]:
    """Lists what is slow or inaccurate on this machine in the stages of a recipe."""
    machine = abilities()
    return [f"stages.{i}.{advice}" for i, stage in enumerate(recipe.stages) for advice in stage.advice(machine)]


def examine(config: Mapping[str, Any]) -> Diagnosis:
    """Finds what of a model can be cut, from its config.json.

    An unknown architecture is no error: the findings say that nothing can be cut, and why.

    Raises:
        HfcompressError: if the config lacks the model's sizes.
    """
    try:
        shape = shape_of(config)
    except UnsupportedError as error:
        facts = {"architecture": str(config.get("model_type", "none"))}
        return Diagnosis(facts, _refuse_all(error.problems[0].message))
    reason = _find_obstacle(config)
    return Diagnosis(_describe_shape(shape), _refuse_all(reason) if reason else _check_granularities(shape))


def _find_obstacle(config: Mapping[str, Any]) -> str:
    """Finds the reason why nothing of a supported architecture can be cut; empty if there is none."""
    if config.get("quantization_config"):
        return "its weights are quantized: cut the model before quantization"
    if config.get("pruned_heads"):
        return "transformers 4 cut its heads, and transformers 5 cannot load that: use `hfcompress convert`"
    return ""


def _refuse_all(reason: str) -> list[Finding]:
    return [Finding(granularity, "", reason) for granularity in GRANULARITIES]


def _describe_shape(shape: Shape) -> dict[str, str]:
    heads, modules = [x.heads for x in shape.layers], ARCHITECTURES[shape.architecture].modules
    grouped = f", {shape.group} queries to a key and value" if shape.group > 1 else ""
    split = "one linear layer" if modules.query == modules.key else "three linear layers"
    return {
        "architecture": f"{shape.architecture}, {STOCK if shape.stock else PRUNED_CLASS}",
        "layers": f"{len(shape.layers)}{', all with the same weights' if shape.spec.shared_layers else ''}",
        "attention heads": f"{_format_range(heads)} of {shape.head_dim}{grouped}; {split} for queries, keys and values",
        "FFN neurons": f"{_format_widths([x.ffn for x in shape.layers])}{', gated' if modules.ffn_gate else ''}",
        "hidden": _format_widths([shape.hidden])
        + (f", embeddings of {shape.embedding}, projected" if shape.embedding else ""),
        "vocabulary": f"{shape.vocab:,}",
    }


def _format_range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _format_widths(values: list[int]) -> str:
    """Formats widths with the largest power of two up to 64 that divides them all; hardware prefers large ones."""
    step = next(step for step in (64, 32, 16, 8, 4, 2, 1) if not any(value % step for value in values))
    return f"{_format_range(values)} (multiples of {step})"


def _check_granularities(shape: Shape) -> list[Finding]:
    return [
        _check_heads(shape),
        _check_neurons(shape),
        _check_layers(shape),
        _check_block(shape, "attention blocks"),
        _check_block(shape, "FFN blocks"),
        _check_hidden(shape),
        Finding("vocabulary", _describe_reload(shape), "with a fast tokenizer of WordPiece, Unigram or BPE"),
        Finding(
            "single weights",
            _describe_reload(shape),
            "smaller if stored as sparse, but not faster in a dense runtime",
        ),
        _check_2_to_4(shape),
    ]


def _check_heads(shape: Shape) -> Finding:
    most = max(x.heads for x in shape.layers)
    what = "groups of heads" if shape.group > 1 else "heads"
    if most <= shape.group:
        return Finding(GRANULARITIES[0], "", f"a layer has only one of its {what}")
    even = shape.with_layers(len(shape.layers), most - shape.group, max(1, shape.layers[0].ffn))
    notes = [f"{what}, with all their queries"] if shape.group > 1 else []
    if not even.stock:
        notes = ["stock if as large a share of the hidden width is cut"]
    elif shape.spec.heads_divide_hidden:
        notes.append("stock only if their number divides the hidden width")
    return Finding(GRANULARITIES[0], _describe_reloads(shape, even), "; ".join(notes))


def _check_neurons(shape: Shape) -> Finding:
    width = max(x.ffn for x in shape.layers)
    if width < 2:
        return Finding(GRANULARITIES[1], "", "the FFN has only one neuron")
    even = replace(shape, layers=tuple(replace(x, ffn=width - 1) for x in shape.layers))
    return Finding(GRANULARITIES[1], _describe_reloads(shape, even), "")


def _check_layers(shape: Shape) -> Finding:
    if len(shape.layers) < 2:
        return Finding(GRANULARITIES[2], "", "the model has only one")
    note = ""
    if shape.spec.shared_layers:
        note = "the one layer runs less often: faster, not smaller"
    elif shape.spec.modern:
        note = "the first must stay: it has no norm before its attention"
    return Finding(GRANULARITIES[2], _describe_reload(replace(shape, layers=shape.layers[:-1])), note)


def _check_block(shape: Shape, granularity: str) -> Finding:
    if shape.spec.shared_layers:
        return Finding(granularity, "", "all layers share their weights: the block would be cut from each")
    first = shape.layers[0]
    layer = Layer(0, first.ffn) if granularity.startswith("attention") else replace(first, ffn=0)
    note = "" if shape.spec.modern or shape.spec.decoder else "the block's norm stays"
    return Finding(granularity, _describe_reload(replace(shape, layers=(layer, *shape.layers[1:]))), note)


def _check_hidden(shape: Shape) -> Finding:
    heads, notes = shape.layers[0].heads, []
    if shape.stock and heads > 1 and not shape.spec.keys.head_dim:
        with_heads = f"{shape.hidden - shape.head_dim} with {heads - 1}"
        notes.append(f"stock if as large a share of the heads is cut: {with_heads}")
    if shape.spec.heads_divide_hidden:
        notes.append("stock only if the number of heads divides the new width")
    if shape.embedding and not shape.spec.shared_layers:
        notes.append(f"not to {shape.embedding}, the width of the embeddings")
    narrow = replace(shape, hidden=shape.hidden - max(heads, 1))
    return Finding(GRANULARITIES[5], _describe_reload(narrow), "; ".join(notes))


def _check_2_to_4(shape: Shape) -> Finding:
    widths = {shape.hidden, *(x.heads * shape.head_dim for x in shape.layers), *(x.ffn for x in shape.layers)}
    odd = sorted(width for width in widths if width % 4)
    if odd:
        return Finding(GRANULARITIES[8], "", f"the width {odd[0]} is not a multiple of 4")
    note = "faster only on sparse tensor cores (NVIDIA, compute capability 8.0)"
    return Finding(GRANULARITIES[8], _describe_reload(shape), note)


def _describe_reloads(shape: Shape, even: Shape) -> str:
    """Describes how a model loads again if all layers lost as much, and if they did not."""
    if not even.stock or shape.spec.shared_layers:
        return _describe_reload(even)
    return f"even: {STOCK}; uneven: {PRUNED_CLASS}; or ONNX"


def _describe_reload(shape: Shape) -> str:
    return f"{STOCK if shape.stock else PRUNED_CLASS}, or ONNX"


def render_findings(diagnosis: Diagnosis) -> Table:
    """Renders the findings as a table for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("what", "can be cut", "loads as", "note"):
        table.add_column(heading, overflow="fold")
    for finding in diagnosis.findings:
        cells = (finding.granularity, "yes" if finding.possible else "no", finding.reload or "-", finding.note or "-")
        table.add_row(*(Text(cell) for cell in cells))
    return table
