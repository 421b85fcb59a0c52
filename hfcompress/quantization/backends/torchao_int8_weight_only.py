"""int8 weights through torchao."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.backends.base import Backend, Work

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn


class TorchaoInt8WeightOnly(Backend):
    """int8 linear layers, multiplied as floats: a smaller file, no faster model; embeddings and head stay.

    What is saved loads through stock `from_pretrained` where torchao is installed.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"
    extra: ClassVar[str] = "torchao"
    modules: ClassVar[tuple[str, ...]] = ("torchao",)
    mixed: ClassVar[bool] = True

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8)

    def unavailable(self) -> tuple[str, str] | None:
        from importlib.metadata import version

        if int(version("transformers").partition(".")[0]) < 5:
            return "transformers 4 cannot save torchao's models as safetensors", "pip install 'transformers>=5'"
        return super().unavailable()

    def config(self) -> Any:
        """What torchao is to do to a linear layer."""
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    def quantize(self, work: Work) -> NDArray[Any]:
        import torch
        import transformers
        from transformers import TorchAoConfig

        from hfcompress.models.artifact import load_model, save_weights, settled_config
        from hfcompress.models.linears import linears

        plain = load_model(work.source, work.auto_class)
        layers = self.layers(plain, work)
        self.note_odd_weights(layers, work)
        model = getattr(transformers, work.auto_class).from_pretrained(
            work.source,
            quantization_config=TorchAoConfig(
                self.config(), modules_to_not_convert=sorted(set(linears(plain)) - set(layers))
            ),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **settled_config(work.source),
        )
        save_weights(model.eval(), work.target)
        return logits_of(model, work.probe)

    def layers(self, model: nn.Module, work: Work) -> dict[str, nn.Linear]:
        """What is quantized: the linear layers inside the transformer layers, but those to keep."""
        from hfcompress.models.linears import layer_linears

        return {path: layer for path, layer in layer_linears(model).items() if path not in work.keep}

    def rounded(self, weight: Tensor) -> Tensor:
        import torch
        from torchao.quantization import quantize_

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        quantize_(layer, self.config())
        stored: Any = layer.weight
        rounded: Tensor = stored.dequantize()
        return rounded
