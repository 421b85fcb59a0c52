"""Distil with a loss of your own: the mean squared error of the logits (Ba & Caruana 2014).

python examples/custom_loss.py MODEL DATA OUTPUT
"""

import sys

from torch.nn import functional as F

import hfcompress as hfc


class LogitError(hfc.Loss):
    """`mean (z_S - z_T)²` over the logits."""

    source = "Do Deep Nets Really Need to be Deep?, Ba & Caruana 2014, arXiv:1312.6184"
    needs_logits = True

    def compute(self, step, learned):
        return F.mse_loss(step.student.logits.float(), step.require_teacher().logits.float())


def main(model: str, data: str, output: str) -> None:
    task = hfc.TextClassification(dataset=data, text=["sentence"], max_length=32)
    distill = hfc.Distill(student=hfc.Student(layers=1), losses=[LogitError()], train=hfc.Train(epochs=1))
    print(hfc.Recipe(model, task, [distill], name="custom-loss").run(output).report)


if __name__ == "__main__":
    main(*sys.argv[1:])
