"""What a prune stage cuts, in words: a sentence on what it was told, and a section on what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfcompress.report.plots_pruning import BARS, conditions, drawn, milliseconds, total
from hfcompress.utils.escape import Markdown, markdown
from hfcompress.utils.wording import count, significant

CAPTIONS = {
    "kept": "Attention heads and FFN neurons that each layer keeps.",
    "sensitivity": "The metric when one layer alone loses its least important heads or neurons, before any cut or "
    "training.",
    "latency": "The latency that the timings of single blocks predicted, and the whole model's.",
}
"""What stands under each picture of `plot_pruning.PICTURES`."""


def told(stage: Any, training: str, recovery: str) -> str:
    """What the stage was told to do.

    Args:
        stage: The prune stage.
        training: How long and by what `train` trains; empty where there is none.
        recovery: The same of `recover`.
    """
    by = f" by `{stage.criterion.name}` ({stage.criterion.source})" if stage.granularities else ""
    parts = [_goal(stage) + by, _course(stage, training)]
    parts += ["units swapped where together they matter less (Kwon et al. 2022)"] if stage.rearrange else []
    parts += [_TUNED[stage.tuning]] if stage.tuning != "off" else []
    after = " after each round" if stage.schedule.use == "iterative" else ""
    parts.append(f"recovery{after}: {recovery}" if recovery else "no recovery")
    return "; ".join(part for part in parts if part)


_TUNED = {
    "scales": "what stays scaled by least squares (Kwon et al. 2022)",
    "weights": "what stays refitted by least squares (Kurtic et al. 2023)",
}


def _goal(stage: Any) -> str:
    shares = {"heads": stage.heads, "FFN neurons": stage.ffn, "hidden dimensions": stage.hidden}
    counts = {"layer": stage.layers, "attention block": stage.attention_blocks, "FFN block": stage.ffn_blocks}
    cut = [f"{share:.0%} of the {name}" for name, share in shares.items() if share]
    cut += [count(number, f"whole {noun}") for noun, number in counts.items() if number]
    cut += ["the tokens that its data does not use"] if stage.vocabulary == "corpus" else []
    goals = [f"cuts {_listed(cut)}"] if cut else []
    goals += [f"cuts heads and FFN neurons down to {_budget(stage.budget)}"] if stage.budget else []
    goals += [f"makes the word embeddings a product of rank {stage.embedding_rank}"] if stage.embedding_rank else []
    goals += [f"sets {_pattern(stage.weights)} to zero"] if stage.weights else []
    return _listed(goals)


def _budget(budget: Any) -> str:
    if budget.kind == "latency":
        return f"{budget.share:.0%} of the model's latency at batch {budget.batch_size} of {budget.length} tokens"
    return f"{budget.share:.0%} of the layers' {'MACs' if budget.kind == 'macs' else budget.kind}"


def _pattern(pattern: Any) -> str:
    if pattern.n_of_m:
        n, m = pattern.n_of_m
        return f"{m - n} of each {m} of the layers' weights"
    blocks = "" if pattern.block == (1, 1) else " in blocks of {} x {}".format(*pattern.block)
    return f"{pattern.share:.0%} of the layers' weights{blocks}"


def _course(stage: Any, training: str) -> str:
    schedule = stage.schedule
    if schedule.use == "iterative":
        return f"in {schedule.rounds} rounds"
    if schedule.use == "lottery":
        start = f"of step {schedule.rewind_steps}" if schedule.rewind_steps else "it began with"
        rounds = count(schedule.rounds, "round")
        return f"a lottery ticket drawn in {rounds}, each from the weights {start} (Frankle & Carbin 2019): {training}"
    return f"while it trains: {training}" if training else ""


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def result(stage: str, notes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a stage cut, for the card: `stage`, `facts` (sentences) and `pictures` (`name`, `file`, `caption`).

    Args:
        stage: The stage's name.
        notes: What the report keeps of it.
        folder: Where the card stands; only pictures that lie there are shown.
    """
    pictures = [{"name": key, "file": f"{stage}-{key}.png", "caption": CAPTIONS[key]} for key in drawn(notes)]
    return {
        "stage": stage,
        "facts": [Markdown(fact) for fact in (_kept(notes), *_told_of(notes)) if fact],
        "pictures": [picture for picture in pictures if (folder / picture["file"]).is_file()],
    }


def _told_of(notes: Mapping[str, Any]) -> list[str]:
    return [say(notes[key]) for key, say in _FACTS.items() if key in notes]


def _kept(notes: Mapping[str, Any]) -> str:
    kept, (hidden, width) = notes["kept"], notes["kept"]["hidden"]
    left, depth = kept["layers"]["kept"], kept["layers"]["of"]
    counts = {"heads": "attention heads", "ffn": "FFN neurons"}
    fewer = {key for key in counts if len(left) < depth or any(new < old for new, old in kept[key])}
    parts = [f"{total(kept[key])} {what}" for key, what in counts.items() if key in fewer]
    parts += [f"{hidden:,} of {width:,} hidden dimensions"] if hidden < width else []
    parts += ["{:,} of {:,} tokens".format(*notes["vocabulary"])] if "vocabulary" in notes else []
    if not parts:
        return ""
    layers = f"Left of its {depth} layers: {_listed([str(number) for number in left])}. In them it keeps"
    return f"{layers if len(left) < depth else 'It keeps'} {_listed(parts)}."


def _latency(notes: Mapping[str, Any]) -> str:
    source, predicted, measured, target = (milliseconds(notes[f"{name}_ms"]) for name in (*BARS, "target"))
    return (
        f"The model took {source} before the cut; the target was {target}, the prediction {predicted}, and it takes "
        f"{measured}: {markdown(conditions(notes))}."
    )


def _sparsity(notes: Mapping[str, Any]) -> str:
    dense, sparse = (significant(notes[f"{kind}_bytes"] / 1e6) for kind in ("dense", "sparse"))
    return (
        f"{notes['share']:.1%} of the weights in its layers' linear modules are zero. Dense runtimes gain nothing from "
        "zeros: they take as much time and memory as any other number. Stored sparsely, each matrix in the smallest "
        f"format that holds it, the weights would take {sparse} MB; as they are, {dense} MB."
    )


def _rank(notes: Mapping[str, Any]) -> str:
    return (
        f"The word embeddings are a table of width {notes['rank']} times a matrix; by the tokens' frequency the "
        f"product kept {notes['kept']:.1%} of the squares of the table that it replaces."
    )


_FACTS = {"embedding_rank": _rank, "latency": _latency, "sparsity": _sparsity}
