"""Prunes a model by its schedule: at once, in rounds, while it trains, or as a lottery ticket.

The model of each step is saved with its facts, so that a run that was killed continues after the last step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageResult
from hfcompress.data.texts import texts_of
from hfcompress.distillation.engine import train_student
from hfcompress.distillation.recovery import Recover
from hfcompress.models.artifact import load_model, load_tokenizer, save_model
from hfcompress.models.shape import shape_of
from hfcompress.pruning.budget import compare_latency
from hfcompress.pruning.criteria.base import LearnedCriterion
from hfcompress.pruning.facts import PruningFacts
from hfcompress.pruning.schedules import Gradual, GrowthTimes, Iterative, Lottery
from hfcompress.pruning.select import cut_model, select_units, target_at
from hfcompress.pruning.state import PruningRun, PruningState
from hfcompress.training.checkpoints import is_sealed, seal
from hfcompress.utils.distributed import broadcast, on_main_process, process_state
from hfcompress.utils.files import new_directory
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep
    from hfcompress.training.overlay import TrainingOverlay


FACTS = "facts.json"
"""The file beside the model of a step: the facts so far (`notes`), and the parent's layers that are left (`layers`)."""
PARENT = "parent"
"""The name of the model that the stage gets, as a step before the first."""


def prune(run: PruningRun) -> StageResult:
    """Cuts and trains by the stage's schedule, and saves the model."""
    schedule = run.options.schedule
    if isinstance(schedule, Lottery):
        state = draw_ticket(run, schedule)
    elif isinstance(schedule, Iterative):
        state = prune_in_rounds(run, schedule.shares)
    elif isinstance(schedule, Gradual) or run.options.criterion.learned:
        state = recover(run, prune_under_masks(run), "")
    else:
        state = recover(run, cut_step(run, PARENT, 1.0, "cut"), "")
    return run.context.finish(state.model, state.tokenizer, find_facts(run, state).to_json())


# Schedules


def prune_in_rounds(run: PruningRun, shares: Sequence[float]) -> PruningState:
    """Cuts and recovers, round after round.

    Args:
        run: The run.
        shares: For each round, the share of all the cutting that is done after it; the last is 1.
    """
    last = PARENT
    for number, share in enumerate(shares[:-1], start=1):
        name = f"round-{number}"
        if not has_step(run, name):
            log.info(f"prune: round {number} of {len(shares)}, up to {share:.0%} of the cutting")
            save_step(run, name, recover(run, cut_step(run, last, share, f"cut-{number}"), f"train-{number}"))
        last = name
    log.info(f"prune: round {len(shares)} of {len(shares)}")
    return recover(run, cut_step(run, last, 1.0, "cut"), "")


def draw_ticket(run: PruningRun, schedule: Lottery) -> PruningState:
    """Trains, cuts, and resets the rest to its early weights, round after round; then trains the last ticket."""
    training = run.options.train
    assert training is not None
    if not has_step(run, "ticket-0"):
        early = load_step(run, PARENT)
        if schedule.rewind_steps:
            log.info(f"prune: {schedule.rewind_steps} steps to the early weights, from which every round starts")
            early = train(run, early, training.until(schedule.rewind_steps), "early")
        save_step(run, "ticket-0", early)
    for number, share in enumerate(schedule.shares, start=1):
        if has_step(run, f"ticket-{number}"):
            continue
        log.info(f"prune: lottery round {number} of {schedule.rounds}, up to {share:.0%} of the cutting")
        ticket = load_step(run, f"ticket-{number - 1}").model
        trained = train(run, load_step(run, f"ticket-{number - 1}"), training, f"train-{number}")
        cut, changes = cut_model(run, trained, share)
        for change in changes:
            ticket = change(ticket)
        save_step(run, f"ticket-{number}", cut_embeddings(run, replace(cut, model=ticket), share))
    return train(run, load_step(run, f"ticket-{schedule.rounds}"), training, "")


def prune_under_masks(run: PruningRun) -> PruningState:
    """Trains the model under masks, and cuts the units that they close."""
    from hfcompress.models.surgery import cut

    training = run.options.train
    assert training is not None
    if not has_step(run, "cut"):
        state = load_step(run, PARENT)
        masks = make_masks(run, state.model)
        state = train(run, state, training, "masked", masks)
        masks.settle(state.model)
        if run.options.weights is None:
            state = replace(state, model=cut(state.model, masks.keep()))
        save_step(run, "cut", cut_embeddings(run, state, 1.0))
    return load_step(run, "cut")


def make_masks(run: PruningRun, model: PreTrainedModel) -> TrainingOverlay:
    """Makes the masks that a learned criterion trains, or those that a gradual schedule closes."""
    from hfcompress.pruning.masks.units import GradualUnits
    from hfcompress.pruning.masks.weights import GradualWeights

    criterion, schedule, pattern = run.options.criterion, run.options.schedule, run.options.weights
    if isinstance(criterion, LearnedCriterion):
        if pattern is not None:
            return criterion.weight_masks(model, pattern)
        return criterion.masks(model, target_at(run, model, 1.0))
    assert isinstance(schedule, Gradual)
    times = GrowthTimes(schedule.begin, schedule.end, schedule.every, schedule.curve)
    if pattern is not None:
        return GradualWeights(model, pattern, partial(criterion.weight_scores, calibration=run.calibration), times)

    def rescore(masked: PreTrainedModel, share: float) -> list[Keep]:
        return select_units(run, masked, criterion.scores(masked, run.calibration), share)

    return GradualUnits(model, rescore, times)


# Steps


def cut_step(run: PruningRun, start: str, share: float, name: str) -> PruningState:
    """Cuts the model of an earlier step until `share` of all the cutting is done, and saves it as step `name`."""
    if not has_step(run, name):
        state, _ = cut_model(run, load_step(run, start), share)
        save_step(run, name, cut_embeddings(run, state, share))
    return load_step(run, name)


def cut_embeddings(run: PruningRun, state: PruningState, share: float) -> PruningState:
    """Cuts the vocabulary and factors the word embeddings, if the stage asks for it; after the last cut alone."""
    from hfcompress.models.factorized_embeddings import factor_embeddings, token_counts
    from hfcompress.models.vocabulary import prune_vocabulary, select_tokens

    options, context = run.options, run.context
    if share < 1:
        return state
    if options.vocabulary == "corpus":
        splits, before = [context.rows("train"), context.rows("dev")], len(state.tokenizer)
        tokenizer, ids = prune_vocabulary(state.tokenizer, texts_of(splits, context.task.text))
        log.info(f"prune: {len(ids):,} of {before:,} tokens stay")
        facts = replace(state.facts, vocabulary=[len(ids), before])
        model = select_tokens(state.model, ids, tokenizer)
        state = replace(state, model=model, tokenizer=tokenizer, facts=facts)
    if options.embedding_rank:
        counts = token_counts(state.tokenizer, texts_of([context.rows("train")], context.task.text))
        model, kept = factor_embeddings(state.model, options.embedding_rank, counts)
        log.info(f"prune: word embeddings of rank {options.embedding_rank} keep {kept:.1%} of the sum of squares")
        rank = {"rank": options.embedding_rank, "kept": round(kept, 6)}
        state = replace(state, model=model, facts=replace(state.facts, embedding_rank=rank))
    return state


def recover(run: PruningRun, state: PruningState, name: str) -> PruningState:
    """Trains the model by the stage's `recover`; without one, the model stays as it is."""
    training = run.options.recover
    return train(run, state, training, name) if training else state


def train(
    run: PruningRun, state: PruningState, training: Recover, name: str, masks: TrainingOverlay | None = None
) -> PruningState:
    """Trains the model; weights that are zero stay zero.

    Args:
        run: The run.
        state: The model before the training.
        training: How to train.
        name: The directory for the checkpoints, below the stage's; empty for the stage's own.
        masks: The overlay on the model while it trains.
    """
    from hfcompress.pruning.sparsity import FixedZeros
    from hfcompress.training.lora import add_lora, merge_adapters

    model = state.model
    if masks is None and run.options.weights:
        masks = FixedZeros(model)
    context = run.context.nest(name) if name else run.context
    if training.lora:
        add_lora(model, training.lora)
    found = train_student(model, training, training, run.parent, context, state.tokenizer, masks=masks)
    facts = replace(state.facts, training={**state.facts.training, **found})
    return replace(state, model=merge_adapters(model) if training.lora else model, facts=facts)


def has_step(run: PruningRun, name: str) -> bool:
    """True if the step was saved before; the first process looks, so that all processes do the same."""
    place = run.context.directory / name
    return bool(broadcast(is_sealed(place) and (place / FACTS).is_file()))


def load_step(run: PruningRun, name: str) -> PruningState:
    """Loads the model of a step and its facts."""
    layers, facts = tuple(range(1, len(run.shape.layers) + 1)), PruningFacts()
    path: Path = run.parent.path if name == PARENT else run.context.directory / name
    if name != PARENT:
        found: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
        layers, facts = tuple(found["layers"]), PruningFacts.from_json(found["notes"])
    model = load_model(path, run.context.task.auto_class).to(process_state().device)
    return PruningState(model, load_tokenizer(path, run.context.task), layers, facts)


def save_step(run: PruningRun, name: str, state: PruningState) -> None:
    """Saves a model and its facts as a step."""

    def save() -> None:
        with new_directory(run.context.directory / name) as scratch:
            save_model(state.model.cpu(), state.tokenizer, scratch)
            facts = {"notes": state.facts.to_json(), "layers": state.layers}
            (scratch / FACTS).write_text(json.dumps(facts), encoding="utf-8")
            seal(scratch)

    on_main_process(save)


# Facts


def find_facts(run: PruningRun, state: PruningState) -> PruningFacts:
    """Finds the facts of the finished model: the parts that stay, the latency if that is the budget, and the zeros."""
    budget, table, final = run.options.budget, run.table, shape_of(state.model.config.to_dict())
    before = [run.shape.layers[number - 1] for number in state.layers]
    kept = {
        "heads": [[new.heads, old.heads] for new, old in zip(final.layers, before, strict=True)],
        "ffn": [[new.ffn, old.ffn] for new, old in zip(final.layers, before, strict=True)],
        "hidden": [final.hidden, run.shape.hidden],
        "layers": {"kept": list(state.layers), "of": len(run.shape.layers)},
    }
    facts = replace(state.facts, kept=kept)
    if budget is not None and table is not None:

        def compare() -> dict[str, Any]:
            return compare_latency(budget, table, run.load_parent(), state.model)

        facts = replace(facts, latency=run.context.remember("latency", compare))
    return replace(facts, sparsity=_measure_zeros(state.model)) if run.options.weights else facts


def _measure_zeros(model: PreTrainedModel) -> dict[str, float]:
    """Measures the share of zeros among the layers' weights, and the model's bytes in dense and in sparse storage."""
    from hfcompress.pruning.sparsity import share_of_zeros, sparse_bytes

    dense = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    found = {"share": share_of_zeros(model), "dense_bytes": dense, "sparse_bytes": sparse_bytes(model)}
    log.info(
        f"prune: {found['share']:.0%} of the layers' weights are zero: {dense / 1e6:.1f} MB, "
        f"{found['sparse_bytes'] / 1e6:.1f} MB in sparse storage; zeros do not make dense runtimes faster"
    )
    return found
