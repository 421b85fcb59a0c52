"""Post-training pruning to half of the MACs, in seconds for 1,000 row-tokens, against the bare passes of the models.

Pruning: each row's gradients by the gates (which also give the Fisher scores), the choice under the budget,
rearrangement, mask tuning, folding and the cut. The bare passes are the part that nothing can save: a forward and a
backward pass of the whole model over the rows, and a forward pass of the whole and of the cut model. Two numbers of
rows show that the time is linear in them; the ratio is for the larger. The faster of two turns counts.

A BERT-base-shaped model and rows of 64 tokens. `--quick` takes a smaller model and fewer rows; `--device cuda` takes
1,024 and 2,048 rows, on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from distill_throughput import SIZES, bert
from torch import Tensor
from torch.nn.functional import cross_entropy

from hfcompress.models.freezing import freeze
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.allocation import keep_best_sum
from hfcompress.pruning.budget import Budget, target_of
from hfcompress.pruning.criteria.base import Scores
from hfcompress.pruning.gates import fold_gates
from hfcompress.pruning.gradients import unit_gradients
from hfcompress.pruning.mask_tuning import rearrange_masks, tune_masks

LENGTH, BATCH, TURNS, TARGET = 64, 32, 2, 0.70
ROWS = {"quick": (128, 256), "full": (128, 256), "cuda": (1024, 2048)}


def main() -> None:
    """Prints the seconds for 1,000 row-tokens at both numbers of rows, and the share of the bare passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    size = SIZES["quick" if args.quick else "full"][0]
    rows = ROWS["quick" if args.quick else "cuda" if args.device == "cuda" else "full"]
    model = bert(*size).eval().to(args.device)
    prune(copy.deepcopy(model), batches(BATCH, args.device))  # the first call does work that is done only once
    print(f"{torch.get_num_threads()} threads, {args.device}, {size}, rows of {LENGTH} tokens")
    share = 0.0
    for count in rows:
        own = batches(count, args.device)
        turns = [
            (bare(model, own), measure_seconds(partial(prune, copy.deepcopy(model), own), args.device))
            for _ in range(TURNS)
        ]
        passes, whole = (min(times) for times in zip(*turns, strict=True))
        share = passes / whole
        per_thousand = whole / (count * LENGTH / 1000)
        print(f"{count:5} rows: {whole:7.2f} s, {per_thousand:.4f} s for 1,000 row-tokens, {share:.0%} in the models")
    print(f"ratio: {share:.2f} (target {TARGET:.2f})")


def batches(rows: int, device: str) -> list[dict[str, Tensor]]:
    """Makes batches of random words and labels."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (rows, LENGTH), generator=draw).to(device)
    labels = torch.randint(2, (rows,), generator=draw).to(device)
    parts = [slice(at, at + BATCH) for at in range(0, rows, BATCH)]
    return [{"input_ids": ids[p], "attention_mask": torch.ones_like(ids[p]), "labels": labels[p]} for p in parts]


def loss(logits: Tensor, labels: Tensor, _mask: Tensor) -> Tensor:
    """Computes the mean loss over rows."""
    return cross_entropy(logits, labels)


def prune(model: Any, rows: list[dict[str, Tensor]]) -> Any:
    """Prunes a model to half the MACs; folds the gates into the given model."""
    seen = list(unit_gradients(model, rows, loss))
    heads, neurons = ([torch.cat(layer) for layer in zip(*side, strict=True)] for side in zip(*seen, strict=True))
    scores = Scores(*([g.square().mean(0) for g in side] for side in (heads, neurons)))
    keep = rearrange_masks(choose_units(model, scores), (heads, neurons))
    gates = tune_masks(model, keep, rows)
    fold_gates(model, gates.heads, gates.neurons)
    return cut(model, keep)


def choose_units(model: Any, scores: Scores) -> list[Keep]:
    """Chooses the units that half of the MACs allows."""
    shape = shape_of(model.config.to_dict())
    return keep_best_sum(scores, target_of(Budget(macs=0.5), shape, shape, 8, LENGTH), normalise=False)


def bare(model: Any, rows: list[dict[str, Tensor]]) -> float:
    """Times the bare passes."""
    shape = shape_of(model.config.to_dict())
    half = [Keep(tuple(range(x.heads // 2)), tuple(range(x.ffn // 2))) for x in shape.layers]
    small = cut(model, half)

    def backward() -> None:
        with freeze(model):
            for batch in rows:
                words = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
                mask, labels = batch["attention_mask"], batch["labels"]
                model(inputs_embeds=words, attention_mask=mask, labels=labels).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            for batch in rows:
                for one in (model, small):
                    one(**batch)

    return sum(measure_seconds(passes, str(model.device)) for passes in (backward, forward))


def measure_seconds(work: Callable[[], Any], device: str) -> float:
    """Times a function until the device is done too."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
