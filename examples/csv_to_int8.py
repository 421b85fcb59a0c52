"""From your own CSV files to an int8 model, with a report and a model card.

python examples/csv_to_int8.py MODEL DATA OUTPUT
DATA holds train.csv, dev.csv and test.csv with the columns `sentence` and `label`.
"""

import sys

import hfcompress as hfc


def main(model: str, data: str, output: str) -> None:
    task = hfc.TextClassification(dataset=data, text=["sentence"], max_length=32)
    finetune = hfc.Finetune(train=hfc.Train(epochs=1, learning_rate=1e-3))
    recipe = hfc.Recipe(model, task, [finetune, hfc.Quantize(backend="onnx_int8")], name="csv-to-int8")
    run = recipe.run(output)  # the same call again resumes, or finds everything done
    print(run.report)
    print(f"the model, with its card: {run.model_directory}")


if __name__ == "__main__":
    main(*sys.argv[1:])
