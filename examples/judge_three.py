"""Measure three models side by side, on the same rows; the first is what the others are compared with.

python examples/judge_three.py DATA MODEL MODEL MODEL
"""

import sys

import hfcompress as hfc


def main(data: str, *models: str) -> None:
    task = hfc.TextClassification(dataset=data, text=["sentence"], max_length=32)
    measure = hfc.Measure(latency=hfc.Latency(batch_sizes=[1, 8], rows=16))
    report = hfc.evaluate(models, task=task, measure=measure)
    print(report)  # a notebook shows it as a table
    best = max(report.rows, key=lambda row: row["quality"]["accuracy"])
    print(f"the most accurate: {best['stage']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
