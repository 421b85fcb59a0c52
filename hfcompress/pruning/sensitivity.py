"""Measures the metric when one layer alone loses its least important heads or neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.utils.logging import log

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfcompress.data.task import Task
    from hfcompress.pruning.criteria.base import Scores


def measure_sensitivity(
    model: PreTrainedModel,
    scores: Scores,
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    shares: Sequence[float],
    group: int = 1,
) -> dict[str, Any]:
    """Measures the metric while gates close the least important heads or neurons of one layer alone.

    All rows are scored for every layer, block and share, so give a sample of them. One process does it alone.

    Args:
        model: The model before it is cut; its weights are left as they were.
        scores: The scores of its units.
        rows: Encoded dev rows.
        tokenizer: The model's tokenizer.
        task: The task, for the metric.
        shares: The shares of a layer's units to close, in (0, 1], rounded to whole groups.
        group: The number of neurons that are kept or cut together.

    Returns:
        `metric`, `split`, `rows`, `whole` (the metric of the model as it is), `shares`, and under `heads` and `ffn`,
        for each layer's weights, the metric at each share.
    """
    from hfcompress.pruning.gates import apply_gates
    from hfcompress.training.evaluate import score

    depth = len(scores.heads)
    log.info(f"prune: sensitivity of {depth} layers: {2 * depth * len(shares) + 1} evaluations of {len(rows)} dev rows")
    whole = score(model, rows, tokenizer, task)
    units = {"heads": scores.heads, "ffn": scores.neurons}
    gates = {
        block: [make_gate(values, 0.0, 1).to(model.device) for values in layers] for block, layers in units.items()
    }

    def without(block: str, layer: int, share: float) -> float:
        closed = make_gate(units[block][layer], share, group if block == "ffn" else 1).to(model.device)
        short = {**gates, block: [*gates[block][:layer], closed, *gates[block][layer + 1 :]]}
        with apply_gates(model, short["heads"], short["ffn"]):
            return score(model, rows, tokenizer, task)

    found = {block: [[without(block, i, share) for share in shares] for i in range(depth)] for block in units}
    return {
        "metric": task.metric_name,
        "split": "dev",
        "rows": len(rows),
        "whole": whole,
        "shares": list(shares),
        **found,
    }


def make_gate(scores: Tensor, share: float, group: int) -> Tensor:
    """Makes a gate `(units,)`: 0 for the least important share of a layer's units, in whole groups, else 1."""
    import torch

    stay = round(len(scores) / group * (1 - share)) * group
    best = scores.float().argsort(descending=True, stable=True)[:stay]
    return torch.zeros(len(scores)).index_fill(0, best.cpu(), 1.0)
