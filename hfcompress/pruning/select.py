"""Scores the parts of a model, selects those that stay, and cuts the others: layers, hidden dimensions, units, weights.

Units are attention heads and FFN neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hfcompress.models.artifact import label_ids, load_tokenizer, read_config
from hfcompress.models.shape import shape_of
from hfcompress.pruning.allocation import count_kept, keep_best_sum, keep_share
from hfcompress.pruning.budget import target_of
from hfcompress.pruning.costs import Target
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.criteria.obs import Obs
from hfcompress.pruning.score_cache import find_scores
from hfcompress.pruning.state import PruningRun, PruningState
from hfcompress.utils.distributed import process_state
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hfcompress.models.surgery import Keep

Change = Callable[["PreTrainedModel"], "PreTrainedModel"]
"""Cuts a model as was decided on another one of the same shape."""
Selected = tuple[PruningState, Change | None]
"""The state with its new facts, and the cut to do; None if this granularity is not cut."""


def cut_model(run: PruningRun, state: PruningState, share: float) -> tuple[PruningState, list[Change]]:
    """Cuts a model until a share of the stage's cutting is done.

    Args:
        run: The run.
        state: The model after the earlier steps.
        share: The share of all the cutting that is done afterwards, in (0, 1].

    Returns:
        The cut model, and the cuts that were done, in order.
    """
    changes = list[Change]()
    for select in (_select_layers, _select_hidden, _select_units, _select_weights):
        state, change = select(run, replace(state, model=state.model.to(process_state().device)), share)
        if change is not None:
            state = replace(state, model=change(state.model))
            changes.append(change)
    return state, changes


def _select_layers(run: PruningRun, state: PruningState, share: float) -> Selected:
    from hfcompress.pruning.layer_dropping import drop_layers, find_required_layers

    if not run.options.layers:
        return state, None
    count = len(run.shape.layers) - round(run.options.layers * share)
    scores = run.options.criterion.layer_scores(state.model, run.calibration)
    bound = find_required_layers(shape_of(state.model.config.to_dict()))
    kept = sorted(sorted(range(len(scores)), key=lambda i: (i not in bound, -scores[i], i))[:count])
    return replace(state, layers=tuple(state.layers[i] for i in kept)), partial(drop_layers, kept=kept)


def _select_hidden(run: PruningRun, state: PruningState, share: float) -> Selected:
    from hfcompress.pruning.hidden_dimensions import cut_hidden

    if not run.options.hidden:
        return state, None
    count = count_kept(run.shape.hidden, run.options.hidden * share, run.options.multiple_of)
    scores = run.options.criterion.hidden_scores(state.model, run.calibration).cpu()
    dims = scores.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return state, partial(cut_hidden, dims=dims)


def _select_units(run: PruningRun, state: PruningState, share: float) -> Selected:
    from hfcompress.models.surgery import cut

    options, model = run.options, state.model
    if "units" not in options.granularities:
        return state, None
    scores = find_scores(run, model)
    if options.sensitivity is not None:
        state = replace(state, facts=replace(state.facts, sensitivity=_find_sensitivity(run, model, scores)))
    keep = select_units(run, model, scores, share)
    if options.rearrange:
        keep = _rearrange(run, model, keep)
    if options.tuning == "scales":
        state = replace(state, facts=replace(state.facts, tuned=_scale(run, model, keep)))
    elif options.tuning == "weights":
        log.info("prune: refitting the weights that stay")
        Obs(rows=run.calibration_rows).refit(model, keep, run.calibration)
    return state, partial(cut, keep=keep)


def _select_weights(run: PruningRun, state: PruningState, share: float) -> Selected:
    from hfcompress.pruning.sparsity import apply_zeros, nonzero_masks

    if run.options.weights is None:
        return state, None
    log.info(f"prune: scoring single weights by {run.options.criterion.name}")
    run.options.criterion.sparsify(state.model, run.options.weights.at(share), run.calibration)
    return state, partial(apply_zeros, kept=nonzero_masks(state.model))


def select_units(run: PruningRun, model: PreTrainedModel, scores: Scores, share: float) -> list[Keep]:
    """Selects the heads and neurons of each layer that stay when `share` of the cutting is done."""
    from hfcompress.models.surgery import Keep

    if run.options.budget is not None:
        comparable = run.options.criterion.comparable
        return keep_best_sum(scores, target_at(run, model, share), normalise=not comparable)
    heads = _select_by_share(run, scores.heads, "heads", share)
    neurons = _select_by_share(run, scores.neurons, "ffn", share)
    return [Keep(h, n) for h, n in zip(heads, neurons, strict=True)]


def target_at(run: PruningRun, model: PreTrainedModel, share: float) -> Target:
    """Computes the cost that a model must reach when `share` of the cutting is done."""
    options, now = run.options, shape_of(model.config.to_dict())
    assert options.budget is not None
    length, group = run.context.task.max_length, options.multiple_of
    return target_of(options.budget, run.shape, now, group, length, run.table, share, options.empty_blocks)


def _select_by_share(run: PruningRun, scores: list[Tensor], kind: str, share: float) -> list[tuple[int, ...]]:
    """Selects the units that stay: no unit of the blocks with the lowest sums of scores, and a share of the others.

    Args:
        run: The run.
        scores: One tensor for each layer's weights.
        kind: `heads` or `ffn`.
        share: The share of the cutting that is done.
    """
    options = run.options
    cut, empty = (options.heads, options.attention_blocks) if kind == "heads" else (options.ffn, options.ffn_blocks)
    multiple = 1 if kind == "heads" or not cut else options.multiple_of
    sums = [float(s.sum()) for s in scores]
    left = sorted(sorted(range(len(sums)), key=lambda i: (sums[i], i))[round(empty * share) :])
    now = _find_remaining_share(run, [len(scores[i]) for i in left], cut * share, kind)
    kept = keep_share([scores[i] for i in left], now, multiple, options.allocation == "even")
    by_layer = dict(zip(left, kept, strict=True))
    return [by_layer.get(i, ()) for i in range(len(scores))]


def _find_remaining_share(run: PruningRun, units: list[int], share: float, kind: str) -> float:
    """Finds the share of the remaining units to cut, so that in all rounds together `share` of the parent's is cut."""
    if not share or not sum(units):
        return 0.0
    before = [x.heads // run.shape.group if kind == "heads" else x.ffn for x in run.shape.layers]
    return max(1 - (1 - share) * len(units) * sum(before) / len(before) / sum(units), 0.0)


def _rearrange(run: PruningRun, model: PreTrainedModel, keep: list[Keep]) -> list[Keep]:
    """Swaps units of a block until those that are cut matter least together."""
    import torch

    from hfcompress.models.architectures import unit_counts
    from hfcompress.pruning.gradients import unit_gradients
    from hfcompress.pruning.mask_tuning import rearrange_masks

    calibration = run.calibration
    # A process without rows needs matrices too, to add them to those of the others.
    none = partial(torch.zeros, 0, device=model.device)
    found = [[[none(units)] for units in counts] for counts in unit_counts(model)]
    for batch in unit_gradients(model, calibration.batches(run.calibration_rows), calibration.loss):
        for rows, gradients in zip(found, batch, strict=True):
            for layer, gradient in zip(rows, gradients, strict=True):
                layer.append(gradient)
    heads, neurons = ([torch.cat(layer) for layer in rows] for rows in found)
    return rearrange_masks(keep, (heads, neurons), calibration.all_reduce_sum)


def _scale(run: PruningRun, model: PreTrainedModel, keep: list[Keep]) -> list[list[float]]:
    """Scales the units that stay, in place; returns each block's error before and after."""
    from hfcompress.pruning.gates import fold_gates
    from hfcompress.pruning.mask_tuning import tune_masks

    log.info("prune: scaling the units that stay")
    calibration = run.calibration
    batches = calibration.batches(run.calibration_rows)
    gates = tune_masks(model, keep, batches, all_reduce_sum=calibration.all_reduce_sum)
    fold_gates(model, gates.heads, gates.neurons)
    return [[round(error, 6) for error in pair] for pair in gates.errors]


def _find_sensitivity(run: PruningRun, model: PreTrainedModel, scores: Scores) -> dict[str, Any]:
    """Measures the sensitivity of each block, once: of the first model that is scored."""
    from hfcompress.pruning.sensitivity import measure_sensitivity

    options, context, wanted = run.options, run.context, run.options.sensitivity
    assert wanted is not None

    def measure() -> dict[str, Any]:
        tokenizer, labels = load_tokenizer(run.parent.path, context.task), label_ids(read_config(run.parent.path))
        rows = context.encode("dev", tokenizer, labels).shuffle(seed=context.seed)
        rows = rows.select(range(min(wanted.rows, len(rows))))
        group = options.multiple_of if options.ffn or options.budget else 1
        return measure_sensitivity(model, scores, rows, tokenizer, context.task, wanted.shares, group)

    found: dict[str, Any] = context.remember("sensitivity", measure)
    return found
