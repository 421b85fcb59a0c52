"""A model as an ONNX graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.base.shape import HEADS
from hfcompress.model.probe import Probe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

OPSET = 17


def export(model: PreTrainedModel, path: Path, probe: Probe) -> None:
    """Writes an ONNX graph with dynamic batch and length; inputs are named as the tokenizer names them.

    Its one output, `logits`, is what `Observed.logits` is.

    Eager attention is exported: its graph has the fewest nodes around the two products.
    """
    import torch
    from torch import nn

    from hfcompress.model.observe import accepted, logits_of_output

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return logits_of_output(self.model(**dict(zip(names, tensors, strict=True))))

    inputs = accepted(model, {name: torch.from_numpy(value) for name, value in probe.items()})
    names = list(inputs)
    by_token = not type(model).__name__.endswith(HEADS["sequence"])
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        torch.onnx.export(
            Logits().eval(),
            tuple(inputs.values()),
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes={
                **{name: {0: "batch", 1: "sequence"} for name in names},
                "logits": {0: "batch", 1: "sequence"} if by_token else {0: "batch"},
            },
            opset_version=OPSET,
            dynamo=False,
        )
    finally:
        model.set_attn_implementation(attention)


def run_onnx(path: Path, probe: Probe) -> NDArray[Any]:
    """An ONNX graph's logits on a probe; an input that the probe lacks (token types) is fed zeros."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = probe["input_ids"]
    feed = {node.name: probe.get(node.name, np.zeros_like(ids)) for node in session.get_inputs()}
    return session.run(["logits"], feed)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """The tracer warns of every shape that it reads, and the exporter of its own age: parity is checked instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
