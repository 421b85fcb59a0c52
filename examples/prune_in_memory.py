"""Prune a model that is in memory, with rows that are in memory: half of the layers' multiply-accumulates stay.

python examples/prune_in_memory.py MODEL DATA
"""

import sys

import datasets
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfcompress as hfc


def main(model: str, data: str) -> None:
    large = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = datasets.load_dataset("csv", data_files={"train": f"{data}/train.csv", "validation": f"{data}/dev.csv"})
    small = hfc.prune(large, tokenizer, rows, macs=0.5, recover=hfc.Recover(epochs=1, learning_rate=1e-3))
    print(f"{large.num_parameters():,} parameters before, {small.num_parameters():,} after")
    print(small(**tokenizer(rows["validation"]["sentence"][:2], padding=True, return_tensors="pt")).logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
