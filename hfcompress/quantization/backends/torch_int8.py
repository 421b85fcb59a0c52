"""int8 in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.dummy_inputs import Probe, logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work
from hfcompress.utils.errors import HfcompressError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel


class TorchInt8(Backend):
    """int8 weights per channel, inputs rounded as they come, embeddings too; loads after `import hfcompress`."""

    source: ClassVar[str] = "https://docs.pytorch.org/docs/stable/quantization.html"
    runs_on: ClassVar[tuple[str, ...]] = ("cpu",)
    mixed: ClassVar[bool] = True

    embeddings: bool = True
    """Store the embedding tables in int8 too: in a small encoder they are most of the file."""

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8, head_bits=8, embedding_bits=8 if self.embeddings else 32)

    def quantize(self, work: Work) -> NDArray[Any]:
        from hfcompress.models.artifact import load_model, save_weights
        from hfcompress.quantization.int8_modules import Int8Config, put_int8_layers

        model = load_model(work.source, work.auto_class)
        self._look(model, work)
        keep = {*work.keep, *(_read_elsewhere(model, work.probe) if self.embeddings else ())}
        put_int8_layers(model, self.embeddings, keep)
        model.config.quantization_config = Int8Config(self.embeddings, keep)
        save_weights(model, work.target)
        return logits_of(model, work.probe)

    def _look(self, model: PreTrainedModel, work: Work) -> None:
        """Notes odd weights, and refuses what is not finite."""
        from hfcompress.models.linears import linears

        self.note_odd_weights(linears(model), work)
        for path, table in _tables(model) if self.embeddings else ():
            if not table.weight.isfinite().all():
                raise HfcompressError(
                    f"{path} has values that are NaN or infinite", "train the model again: no grid has room for them"
                )

    def rounded(self, weight: Tensor) -> Tensor:
        from hfcompress.quantization.grids.embeddings import rounded_rows

        return rounded_rows(weight, 8)


def _tables(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    from torch import nn

    return ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Embedding))


def _read_elsewhere(model: PreTrainedModel, probe: Probe) -> set[str]:
    """Embeddings that stay: of a table that other code reads as it is (DeBERTa), or of numbers for heads (MPNet)."""
    called: set[int] = set()
    hooks = [
        table.register_forward_hook(lambda table, *_: called.add(id(table)))
        for path, table in _tables(model)
        if "embed" in path
    ]
    logits_of(model, probe)
    for hook in hooks:
        hook.remove()
    return {path for path, table in _tables(model) if id(table) not in called}
