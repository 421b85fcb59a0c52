"""A model as an ONNX graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.architectures import task_head_of
from hfcompress.models.dummy_inputs import Probe
from hfcompress.onnx.graph_files import save_graph
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.processors import default_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

OPSET = 17


def export(model: PreTrainedModel, path: Path, probe: Probe) -> None:
    """Writes an ONNX graph with dynamic batch and length; inputs are named as the tokenizer names them.

    Its output `logits` is what `Observed.logits` is; `start_logits` and `end_logits` of a span head, which transformers
    and Optimum know by these names, come after it. The linear layers are as `fuse.linears` finds them, and
    attention is one operator wherever the model computes it by `scaled_dot_product_attention`.
    """
    import onnx
    import torch
    from torch import nn

    from hfcompress.models.forward import accepted, logits_of_output
    from hfcompress.onnx.fuse import DOMAIN, fuse
    from hfcompress.onnx.trace import traced

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output = self.model(**dict(zip(names, tensors, strict=True)))
            return logits_of_output(output), *(output[side] for side in outputs[1:])

    inputs = accepted(model, {name: torch.from_numpy(value) for name, value in probe.items()})
    names = list(inputs)
    head = task_head_of(type(model).__name__)
    outputs = ["logits", *(["start_logits", "end_logits"] if head == "span" else [])]
    axes = {0: "batch"} if head == "sequence" else {0: "batch", 1: "sequence"}
    # torch puts each tensor of a large model into a file of its own, beside the graph.
    with scratch_directory() as folder:
        file = folder / "model.onnx"
        with traced(model):
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


def run_onnx(path: Path, probe: Probe) -> NDArray[Any]:
    """The logits on a probe of an ONNX graph that was exported here; token types that the probe lacks are zeros."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = default_threads()  # its own choice knows neither affinity nor a container's quota
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"token_type_ids": np.zeros_like(probe["input_ids"])}
    feed = {node.name: {**types, **probe}[node.name] for node in session.get_inputs()}
    return session.run(["logits"], feed)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """The tracer warns of every shape that it reads, and the exporter of its own age: parity is checked instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)
