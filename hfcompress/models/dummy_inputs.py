"""Dummy inputs: a small padded batch that every model of a config can read, to compare two copies of a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.models.artifact import pad_token_of, read_config
from hfcompress.models.forward import logits_of_output, select_inputs
from hfcompress.models.shape import shape_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

DummyInputs = Mapping[str, "NDArray[Any]"]
"""Token arrays `(rows, length)` by the name of the model's input."""


def make_dummy_inputs(path: Path, rows: int = 4, length: int = 24) -> DummyInputs:
    """Makes token arrays `(rows, length)` for the model in a directory: equal for equal configs, most rows padded."""
    import numpy as np

    config = read_config(path)
    shape = shape_of(config)
    length = min(length, shape.usable_positions)
    generator = np.random.default_rng(0)
    pad = pad_token_of(path) or 0
    ids = generator.integers(min(5, shape.vocab - 1), shape.vocab, (rows, length))
    lengths = np.linspace(length, 2, rows).astype(int)[:, None]
    mask = (np.arange(length)[None] < lengths).astype(np.int64)
    ids = np.where((mask == 1) & (ids != pad), ids, np.where(mask == 1, shape.vocab - 1, pad)).astype(np.int64)
    dummy_inputs = {"input_ids": ids, "attention_mask": mask}
    return dummy_inputs | ({"token_type_ids": np.zeros_like(ids)} if shape.types else {})


def logits_of(model: Any, dummy_inputs: DummyInputs) -> NDArray[Any]:
    """Computes a PyTorch model's logits on dummy_inputs (`Observation.logits`), in eval mode, as float32."""
    import torch

    device = next(model.parameters()).device
    inputs = {name: torch.from_numpy(value).to(device) for name, value in dummy_inputs.items()}
    with torch.inference_mode():
        return logits_of_output(model.eval()(**select_inputs(model, inputs))).float().cpu().numpy()
