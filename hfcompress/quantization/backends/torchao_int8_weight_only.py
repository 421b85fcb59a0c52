"""int8 weights by torchao, multiplied as floats: a smaller file, but no faster model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfcompress.models.dummy_inputs import logits_of
from hfcompress.models.shape import Shape
from hfcompress.quantization.advice import (
    NEWER,
    OLDER,
    UNMEASURED_ARM,
    UNMEASURED_GPU,
    UNMEASURED_PROCESSOR,
    Note,
    has_avx512,
    has_only_avx2,
    lacks_tensor_cores,
)
from hfcompress.quantization.backends.base import Backend, QuantizationJob, QuantizedModel

if TYPE_CHECKING:
    from torch import Tensor, nn


class TorchaoInt8WeightOnly(Backend):
    """Stores linear layers of transformer layers in int8 and multiplies floats: a smaller file, but no faster model.

    Embeddings and task head stay in float32. Stock `from_pretrained` loads the model if torchao is installed.
    """

    source: ClassVar[str] = "https://docs.pytorch.org/ao"
    extra: ClassVar[str] = "torchao"
    modules: ClassVar[tuple[str, ...]] = ("torchao",)
    keeps_layers: ClassVar[bool] = True
    notes: ClassVar[tuple[Note, ...]] = (
        Note(has_only_avx2, f"measured 1.1 times slower {OLDER}"),
        Note(has_avx512, f"measured 1.2 to 1.7 times slower {NEWER}"),
        UNMEASURED_ARM,
        UNMEASURED_PROCESSOR,
        lacks_tensor_cores("int8"),
        UNMEASURED_GPU,
    )

    def plan(self, shape: Shape) -> Shape:
        return replace(shape, linear_bits=8)

    def unavailable(self) -> tuple[str, str] | None:
        from importlib.metadata import version

        if int(version("transformers").partition(".")[0]) < 5:
            return "transformers 4 cannot save torchao's models as safetensors", "pip install 'transformers>=5'"
        return super().unavailable()

    def config(self) -> Any:
        """Returns torchao's configuration for a linear layer."""
        from torchao.quantization import Int8WeightOnlyConfig

        return Int8WeightOnlyConfig()

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        import torch
        import transformers
        from transformers import TorchAoConfig

        from hfcompress.models.artifact import find_missing_config, load_model, save_weights
        from hfcompress.models.linears import linears

        plain = load_model(job.source, job.auto_class)
        layers = self.find_layers(plain, job)
        odd = self.find_odd_weights(layers, job)
        model = getattr(transformers, job.auto_class).from_pretrained(
            job.source,
            quantization_config=TorchAoConfig(
                self.config(), modules_to_not_convert=sorted(set(linears(plain)) - set(layers))
            ),
            device_map="cuda" if torch.cuda.is_available() else "cpu",
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **find_missing_config(job.source),
        )
        save_weights(model.eval(), job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs), odd)

    def find_layers(self, model: nn.Module, job: QuantizationJob) -> dict[str, nn.Linear]:
        """Returns the layers to quantize, by path: those inside the transformer layers, except those to keep."""
        from hfcompress.models.linears import layer_linears

        return {path: layer for path, layer in layer_linears(model).items() if path not in job.keep}

    def fake_quantize(self, weight: Tensor) -> Tensor:
        import torch
        from torchao.quantization import quantize_

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
        quantize_(layer, self.config())
        stored: Any = layer.weight
        dequantized: Tensor = stored.dequantize()
        return dequantized
