"""A model at half of its layers' MACs against the whole one, and a model cut to a latency against that target.

On a CPU, batches of 32 rows of 128 tokens, all models in turns. The L2 norm of random weights decides what is cut: only
speed is measured. BERT-base's shape; `--quick` takes MiniLM-L6's shape, `--threads N` sets the number of threads.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import cut
from hfcompress.pruning.allocation import keep_best_sum
from hfcompress.pruning.budget import Budget, target_of
from hfcompress.pruning.criteria.base import CRITERIA, Calibration
from hfcompress.pruning.latency_table import Setting, measure_table, predict, time_models

SHAPES = {
    "full": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "quick": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
}
GROUP, LENGTH, TARGET = 8, 128, 1.7


def describe_shape(small: Any) -> str:
    """Lists the heads and neurons of each layer."""
    return " ".join(f"{layer.heads}x{layer.ffn}" for layer in shape_of(small.config.to_dict()).layers)


def main() -> None:
    """Prints the speed-up at half of the MACs, and the ratio of a latency to its target."""
    warnings.simplefilter("ignore")
    size = "quick" if "--quick" in sys.argv else "full"
    threads = int(sys.argv[sys.argv.index("--threads") + 1]) if "--threads" in sys.argv else None
    setting = Setting(length=LENGTH, threads=threads)
    model = BertForSequenceClassification(BertConfig(**SHAPES[size])).eval()
    shape = shape_of(model.config.to_dict())
    no_data = Calibration(lambda _: [], lambda *_: torch.zeros(()), seed=0)
    scores = CRITERIA.parse("magnitude").scores(model, no_data)
    table = measure_table(model, shape, setting)
    setting = replace(setting, threads=table.threads)
    smalls = []
    for budget in (Budget(macs=0.5), Budget(latency=0.5)):
        target = target_of(budget, shape, shape, GROUP, LENGTH, table)
        smalls.append(cut(model, keep_best_sum(scores, target, normalise=True)))
    source, by_macs, by_latency = time_models([model, *smalls], setting)
    print(f"{setting.device_name}, {setting.threads} threads, batch {setting.batch_size} x {LENGTH}, {SHAPES[size]}")
    print(f"table: the whole model {predict(table, shape) * 1e3:.0f} ms, measured {source * 1e3:.0f} ms")
    print(f"half of the MACs: {describe_shape(smalls[0])}")
    print(f"half of the time: {describe_shape(smalls[1])}")
    off = by_latency / source * 200 - 100
    print(f"                  {by_latency * 1e3:.0f} ms, target {source * 500:.0f} ms: {off:+.1f}%")
    print(f"half of the MACs: {by_macs * 1e3:.0f} ms against {source * 1e3:.0f} ms")
    print(f"ratio: {source / by_macs:.2f} (target {TARGET})")


if __name__ == "__main__":
    main()
