"""Eight budgets against one, all from the same scores: each further budget costs only the choice and the cut.

Fisher scores of random rows; each budget ends in a cut model. BERT-base's shape and 2,048 rows of length 64; `--quick`
takes MiniLM-L6's shape and 256 rows. The ratio is the time of all eight budgets to that of the first, with scoring.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from pruned_speed import GROUP, SHAPES
from transformers import BertConfig, BertForSequenceClassification

from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import cut
from hfcompress.pruning.allocation import keep_best_sum
from hfcompress.pruning.budget import Budget, target_of
from hfcompress.pruning.criteria.base import CRITERIA, Calibration

BUDGETS = (0.5, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
BATCH, LENGTH, TARGET = 32, 64, 1.3


def batches(count: int) -> Iterator[dict[str, Any]]:
    """Makes batches of random tokens and labels."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, BATCH):
        ids = torch.randint(1000, 30000, (min(BATCH, count - start), LENGTH), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Computes the mean loss over rows."""
    return torch.nn.functional.cross_entropy(logits, labels)


def main() -> None:
    """Prints the seconds of scoring and of each budget, and the ratio."""
    warnings.simplefilter("ignore")
    size, rows = ("quick", 256) if "--quick" in sys.argv else ("full", 2048)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES[size])).eval()
    shape = shape_of(model.config.to_dict())
    start = time.perf_counter()
    scores = CRITERIA.parse({"use": "fisher", "rows": rows}).scores(model, Calibration(batches, cross_entropy, 0))
    scoring = time.perf_counter() - start
    print(f"{torch.get_num_threads()} threads, {rows} rows of {LENGTH}, {SHAPES[size]}: scoring {scoring:.2f} s")
    seconds = []
    for share in BUDGETS:
        start = time.perf_counter()
        keep = keep_best_sum(scores, target_of(Budget(macs=share), shape, shape, GROUP, LENGTH), normalise=False)
        chosen = time.perf_counter() - start
        small = shape_of(cut(model, keep).config.to_dict())
        seconds.append(time.perf_counter() - start)
        stay = f"{sum(x.heads for x in small.layers)} heads and {sum(x.ffn for x in small.layers)} neurons stay"
        print(f"{share:.0%} of the MACs: chosen in {chosen:.3f} s, cut in {seconds[-1] - chosen:.3f} s, {stay}")
    print(f"ratio: {(scoring + sum(seconds)) / (scoring + seconds[0]):.2f} (target {TARGET})")


if __name__ == "__main__":
    main()
