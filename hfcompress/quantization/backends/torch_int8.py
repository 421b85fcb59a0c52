"""int8 in plain PyTorch; only hfcompress is needed to load it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.dummy_inputs import DummyInputs, logits_of
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TorchInt8(Backend):
    """Stores linear layers and embeddings in int8; rounds inputs batch by batch; loads after `import hfcompress`."""

    source: ClassVar[str] = "https://docs.pytorch.org/docs/stable/quantization.html"
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    keeps_layers: ClassVar[bool] = True

    embeddings: bool = True
    """Quantize the embedding tables too, which are most of the file of a small encoder."""

    @property
    def rounds_by_batch(self) -> bool:
        return True

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=8 if self.embeddings else 32)

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        from hfcompress.models.artifact import load_model, save_weights
        from hfcompress.quantization.int8_modules import Int8Config, put_int8_layers

        model = load_model(job.source, job.auto_class)
        odd = self._check_weights(model, job)
        keep = {*job.keep, *(find_uncalled_tables(model, job.dummy_inputs) if self.embeddings else ())}
        put_int8_layers(model, self.embeddings, keep)
        model.config.quantization_config = Int8Config(self.embeddings, keep)
        save_weights(model, job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs), odd)

    def _check_weights(self, model: PreTrainedModel, job: QuantizationJob) -> tuple[OddWeights, ...]:
        """Finds odd weights, and refuses weights that are not finite."""
        from hfcompress.models.linears import linears

        odd = self.find_odd_weights(linears(model), job)
        for path, table in _tables(model) if self.embeddings else ():
            if not table.weight.isfinite().all():
                raise HfcompressError(
                    f"{path} has values that are NaN or infinite",
                    "train the model again: such weights cannot be quantized",
                )
        return odd

    def fake_quantize(self, weight: Tensor) -> Tensor:
        from hfcompress.quantization.grids.rowwise import fake_quantize_rowwise

        return fake_quantize_rowwise(weight, 8)


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from torch import nn

    return ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding))


def find_uncalled_tables(model: PreTrainedModel, dummy_inputs: DummyInputs) -> set[str]:
    """Finds embedding tables that must stay float, because the model reads their weights without calling them.

    These are DeBERTa's relative positions, and MPNet's table of numbers for attention heads.
    """
    called: set[int] = set()
    hooks = [
        table.register_forward_hook(lambda table, *_: called.add(id(table)))
        for path, table in _tables(model)
        if "embed" in path
    ]
    logits_of(model, dummy_inputs)
    for hook in hooks:
        hook.remove()
    return {path for path, table in _tables(model) if id(table) not in called}
