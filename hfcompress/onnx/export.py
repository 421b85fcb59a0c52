"""Exports a PyTorch model as an ONNX graph.

It uses `torch.onnx.export(dynamo=False)`. The newer exporter (`dynamo=True`) was measured and not chosen: it exports
five times more slowly, and the int8 graph that comes from it ran 1.1 to 1.2 times more slowly
(`benchmarks/onnx_export.py`, docs/results.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.models.architectures import task_head_of
from hfcompress.models.artifact import load_model
from hfcompress.models.dummy_inputs import DummyInputs
from hfcompress.onnx.graph_io import require_same_logits, run_onnx, save_graph
from hfcompress.utils.files import scratch_directory

if TYPE_CHECKING:
    import onnx
    from transformers import PreTrainedModel

OPSET = 17
OPTIMUM_TASKS = {
    "sequence": "text-classification",
    "token": "token-classification",
    "span": "question-answering",
    "mask": "fill-mask",
}
"""Optimum's names for the task heads that read a text at once, for backends that export by Optimum."""


def export(model: PreTrainedModel, path: Path, dummy_inputs: DummyInputs) -> None:
    """Writes an ONNX graph with dynamic batch size and length; its inputs have the names of the tokenizer's outputs.

    The output `logits` is the same as `Observation.logits`. A graph with a span head also has the outputs
    `start_logits` and `end_logits`, the names that transformers and Optimum know. Linear layers are nodes that
    `fuse.linears` finds, and attention is one operator if the model computes it by `scaled_dot_product_attention`.

    Args:
        model: A model in eval mode, on the CPU.
        path: The file to write.
        dummy_inputs: The dummy inputs that the model is traced with.
    """
    import onnx
    import torch
    from torch import nn

    from hfcompress.models.forward import logits_of_output, select_inputs
    from hfcompress.onnx.fuse import DOMAIN, fuse
    from hfcompress.onnx.trace import keep_layers_whole

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(**dict(zip(names, tensors, strict=True)))
            return logits_of_output(output), *(output[side] for side in outputs[1:])

    inputs = select_inputs(model, {name: torch.from_numpy(value) for name, value in dummy_inputs.items()})
    names = list(inputs)
    head = task_head_of(type(model).__name__)
    outputs = ["logits", *(["start_logits", "end_logits"] if head == "span" else [])]
    axes = {0: "batch"} if head == "sequence" else {0: "batch", 1: "sequence"}
    # torch writes each tensor of a large model into a file of its own beside the graph.
    with scratch_directory() as folder:
        file = folder / "model.onnx"
        with keep_layers_whole(model):
            torch.onnx.export(
                Logits().eval(),
                tuple(inputs.values()),
                str(file),
                input_names=names,
                output_names=outputs,
                dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names} | dict.fromkeys(outputs, axes),
                custom_opsets={DOMAIN: 1},
                opset_version=OPSET,
                dynamo=False,
            )
        graph = onnx.load(file)
    save_graph(fuse(graph), path)


def load_and_export(
    source: Path, auto_class: str, dummy_inputs: DummyInputs
) -> tuple[PreTrainedModel, onnx.ModelProto]:
    """Loads a model directory, exports it, and checks that both give the same logits on the dummy inputs.

    Returns:
        The float model and its graph.

    Raises:
        HfcompressError: if the graph's logits differ from the model's, or weights are not finite.
    """
    import onnx

    from hfcompress.models.linears import linears
    from hfcompress.models.odd_weights import require_finite

    model = load_model(source, auto_class)
    require_finite(linears(model))
    with scratch_directory() as folder, quiet():
        path = folder / "model.onnx"
        export(model, path, dummy_inputs)
        require_same_logits(run_onnx(path, dummy_inputs), model, dummy_inputs)
        return model, onnx.load(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings of exporters while the context lasts.

    The tracer warns about every shape that it reads, and the exporter warns that it is deprecated. Instead of reading
    warnings, `require_same_logits` checks the result.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)
