"""Sensitivity: the metric when one layer alone loses its least important heads or neurons."""

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

    All rows are scored for every layer, block and share, so a sample of them is enough. It is one process's work.

    Args:
        model: The model before it is cut; its weights are left as they were.
        scores: How much its units matter.
        rows: Encoded dev rows.
        tokenizer: The model's.
        task: Gives the metric.
        shares: Shares of a layer's units that go, in (0, 1]; the nearest number of whole groups does.
        group: Neurons that stay or go together.

    Returns:
        `metric`, `split`, `rows`, `whole` (the metric of the model as it is), `shares`, and under `heads` and `ffn`,
        for each layer's weights, the metric at each share.
    """
    from hfcompress.pruning.gates import gated
    from hfcompress.training.evaluate import score

    depth = len(scores.heads)
    log.info(f"prune: sensitivity of {depth} layers, {2 * depth * len(shares) + 1} scorings of {len(rows)} dev rows")
    whole = score(model, rows, tokenizer, task)
    units = {"heads": scores.heads, "ffn": scores.neurons}
    gates = {block: [gate(values, 0.0, 1).to(model.device) for values in layers] for block, layers in units.items()}

    def without(block: str, layer: int, share: float) -> float:
        closed = gate(units[block][layer], share, group if block == "ffn" else 1).to(model.device)
        short = {**gates, block: [*gates[block][:layer], closed, *gates[block][layer + 1 :]]}
        with gated(model, short["heads"], short["ffn"]):
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


def gate(scores: Tensor, share: float, group: int) -> Tensor:
    """A gate `(units,)` that is shut to the least important share of a layer's units, in whole groups."""
    import torch

    stay = round(len(scores) / group * (1 - share)) * group
    best = scores.float().argsort(descending=True, stable=True)[:stay]
    return torch.zeros(len(scores)).index_fill(0, best.cpu(), 1.0)
