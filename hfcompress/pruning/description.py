"""Describes a prune stage for the card: one sentence about the stage, and paragraphs about the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.distillation.wording import describe_training
from hfcompress.pruning.figures import BARS, describe_conditions, format_milliseconds, format_total
from hfcompress.utils.escape import Markdown, markdown
from hfcompress.utils.wording import count, join, significant

if TYPE_CHECKING:
    from hfcompress.pruning.budget import Budget
    from hfcompress.pruning.sparsity_pattern import SparsityPattern
    from hfcompress.pruning.stage import Prune

_TUNING = {
    "scales": "remaining units scaled by least squares (Kwon et al. 2022)",
    "weights": "remaining weights refitted by least squares (Kurtic et al. 2023)",
}


def describe(stage: Prune) -> Markdown:
    """Describes what the stage does, in one sentence."""
    by = f" by `{stage.criterion.name}` ({stage.criterion.source})" if stage.granularities else ""
    parts = [_describe_goal(stage) + by, _describe_schedule(stage)]
    parts += ["units swapped by their joint importance (Kwon et al. 2022)"] if stage.rearrange else []
    parts += [_TUNING[stage.tuning]] if stage.tuning != "off" else []
    after = " after each round" if stage.schedule.use == "iterative" else ""
    recovery = describe_training(stage.recover)
    parts.append(f"recovery{after}: {recovery}" if recovery else "no recovery")
    return Markdown(f"**prune**: {'; '.join(filter(None, parts))}")


def _describe_goal(stage: Prune) -> str:
    shares = {"heads": stage.heads, "FFN neurons": stage.ffn, "hidden dimensions": stage.hidden}
    counts = {"layer": stage.layers, "attention block": stage.attention_blocks, "FFN block": stage.ffn_blocks}
    cut = [f"{share:.0%} of the {name}" for name, share in shares.items() if share]
    cut += [count(number, f"whole {noun}") for noun, number in counts.items() if number]
    cut += ["the tokens that do not occur in the data"] if stage.vocabulary == "corpus" else []
    goals = [f"cuts {join(cut)}"] if cut else []
    goals += [f"cuts heads and FFN neurons down to {_describe_budget(stage.budget)}"] if stage.budget else []
    goals += [f"makes the word embeddings a product of rank {stage.embedding_rank}"] if stage.embedding_rank else []
    goals += [f"sets {_describe_pattern(stage.weights)} to zero"] if stage.weights else []
    return join(goals)


def _describe_budget(budget: Budget) -> str:
    if budget.kind == "latency":
        return f"{budget.share:.0%} of the model's latency at batch {budget.batch_size} of {budget.length} tokens"
    return f"{budget.share:.0%} of the layers' {'MACs' if budget.kind == 'macs' else budget.kind}"


def _describe_pattern(pattern: SparsityPattern) -> str:
    if pattern.n_of_m:
        n, m = pattern.n_of_m
        return f"{m - n} of each {m} of the layers' weights"
    blocks = "" if pattern.block == (1, 1) else " in blocks of {} x {}".format(*pattern.block)
    return f"{pattern.share:.0%} of the layers' weights{blocks}"


def _describe_schedule(stage: Prune) -> str:
    schedule, training = stage.schedule, describe_training(stage.train)
    if schedule.use == "iterative":
        return f"in {schedule.rounds} rounds"
    if schedule.use == "lottery":
        start = f"of step {schedule.rewind_steps}" if schedule.rewind_steps else "before training"
        rounds = count(schedule.rounds, "round")
        return f"a lottery ticket drawn in {rounds}, each from the weights {start} (Frankle & Carbin 2019): {training}"
    return f"during training: {training}" if training else ""


def summarize(facts: Mapping[str, Any]) -> list[Markdown]:
    """Writes the card's paragraphs about what the stage cut."""
    parts = [_summarize_kept(facts), *(write(facts[key]) for key, write in _PARAGRAPHS.items() if key in facts)]
    return [Markdown(part) for part in parts if part]


def _summarize_kept(facts: Mapping[str, Any]) -> str:
    kept, (hidden, width) = facts["kept"], facts["kept"]["hidden"]
    left, depth = kept["layers"]["kept"], kept["layers"]["of"]
    counts = {"heads": "attention heads", "ffn": "FFN neurons"}
    fewer = {key for key in counts if len(left) < depth or any(new < old for new, old in kept[key])}
    parts = [f"{format_total(kept[key])} {what}" for key, what in counts.items() if key in fewer]
    parts += [f"{hidden:,} of {width:,} hidden dimensions"] if hidden < width else []
    parts += ["{:,} of {:,} tokens".format(*facts["vocabulary"])] if "vocabulary" in facts else []
    if not parts:
        return ""
    numbers = join([str(number) for number in left])
    layers = f"It keeps {'layer' if len(left) == 1 else 'layers'} {numbers} of {depth}, and in them"
    return f"{layers if len(left) < depth else 'It keeps'} {join(parts)}."


def _summarize_latency(latency: Mapping[str, Any]) -> str:
    source, predicted, measured, target = (format_milliseconds(latency[f"{name}_ms"]) for name in (*BARS, "target"))
    return (
        f"The latency was {source} before the cut. The target was {target}, the prediction {predicted}, and the "
        f"measured latency {measured} ({markdown(describe_conditions(latency))})."
    )


def _summarize_sparsity(sparsity: Mapping[str, Any]) -> str:
    dense, sparse = (significant(sparsity[f"{kind}_bytes"] / 1e6) for kind in ("dense", "sparse"))
    return (
        f"{sparsity['share']:.1%} of the weights in the linear modules of its layers are zero. Dense runtimes gain "
        "nothing from zeros: they take as much time and memory as any other number. In the smallest sparse format for "
        f"each matrix the weights would take {sparse} MB; as they are, they take {dense} MB."
    )


def _summarize_rank(rank: Mapping[str, Any]) -> str:
    return (
        f"The word embeddings are a product of a table of width {rank['rank']} and a matrix. Weighted by token "
        f"frequency, it kept {rank['kept']:.1%} of the squared values of the table that it replaces."
    )


_PARAGRAPHS = {"embedding_rank": _summarize_rank, "latency": _summarize_latency, "sparsity": _summarize_sparsity}
