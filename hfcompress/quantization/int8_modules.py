"""int8 linear layers and embeddings in plain torch, and their quantization method for transformers.

Importing this module registers the method with transformers. After that (after `import hfcompress`), stock
`from_pretrained` loads a directory whose config says `{"quant_method": "hfcompress_int8"}`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.models.architectures import OWN_METHOD
from hfcompress.quantization.grids.rowwise import quantize_rowwise

METHOD = f"{OWN_METHOD}int8"


class _Int8(nn.Module):
    """A table of int8 codes with a scale for each row: `w ≈ weight_scale[:, None] * weight[..., 0]`.

    The last axis of size 1 protects users who forget to import hfcompress: if the codes had the shape of a float
    layer's weights, transformers would load them as weights, and only warn.
    """

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        empty = torch.empty(rows, columns, 1, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(rows, device=device), requires_grad=False)

    def quantize(self, weight: Tensor) -> None:
        """Stores a float table `(rows, columns)` in this one."""
        codes, scales = quantize_rowwise(weight, 8)
        self.weight.copy_(codes.unsqueeze(-1))
        self.weight_scale.copy_(scales.squeeze(-1))

    @property
    def codes(self) -> Tensor:
        """The codes, `(rows, columns)`."""
        return self.weight.detach().squeeze(-1)


class Int8Linear(_Int8):
    """A linear layer that rounds its inputs to 8 bits, by the smallest and the largest value of the whole batch.

    It calls torch's own int8 product and prepacks the weights for this CPU at the first call. On a GPU and in half
    precision, where torch has no such product, it dequantizes the weights and multiplies floats.

    Attributes:
        weight: int8, `(out_features, in_features, 1)`.
        weight_scale: `(out_features,)`.
        bias: `(out_features,)`, or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, device: torch.device) -> None:
        super().__init__(out_features, in_features, device)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        self._packed: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or torch.backends.quantized.engine == "none":
            # Codes are scaled before the sum: half precision cannot hold sums of codes.
            weight = self.codes.to(inputs.dtype) * self.weight_scale.to(inputs.dtype).unsqueeze(-1)
            return functional.linear(inputs, weight, None if self.bias is None else self.bias.to(inputs.dtype))
        if self._packed is None:
            self._packed = self._pack()
        # Without VNNI two products are added in 16 bits, which overflow unless inputs have 7 bits.
        output: Tensor = torch.ops.quantized.linear_dynamic(inputs, self._packed, not torch.cpu._is_vnni_supported())
        return output

    def _pack(self) -> Any:
        scales = self.weight_scale.detach().double()
        zeros = torch.zeros_like(scales, dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*quantized tensor creation.*deprecated")  # of torch 2.13
            weight = torch._make_per_channel_quantized_tensor(self.codes, scales, zeros, 0)
        return torch.ops.quantized.linear_prepack(weight, None if self.bias is None else self.bias.detach().float())

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Int8):
    """An embedding table in int8; only the rows that are looked up become floats.

    Attributes:
        weight: int8, `(num_embeddings, embedding_dim, 1)`.
        weight_scale: `(num_embeddings,)`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, device: torch.device) -> None:
        super().__init__(num_embeddings, embedding_dim, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.codes) * self.weight_scale[ids].unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def put_int8_layers(model: Any, embeddings: bool, keep: Collection[str]) -> None:
    """Replaces a model's linear layers and embeddings by int8 ones, in place.

    A linear layer that shares its weights with an embedding (a mask head's) is replaced if that embedding is.

    Args:
        model: A model with or without its task head; on the meta device only its modules change.
        embeddings: True to replace embeddings too.
        keep: Paths of layers that stay, in the model with its task head.
    """
    shared: dict[int, _Int8] = {}
    for path, old in list(_find_layers(model, embeddings, keep)):
        new = _make_int8(old)
        if not old.weight.is_meta:
            with torch.no_grad():
                new.quantize(old.weight)
        first = shared.setdefault(id(old.weight), new)
        new.weight = first.weight
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, new.train(old.training))


def _make_int8(old: Any) -> _Int8:
    device = old.weight.device
    if isinstance(old, nn.Embedding):
        return Int8Embedding(old.num_embeddings, old.embedding_dim, old.padding_idx, device)
    new = Int8Linear(old.in_features, old.out_features, old.bias is not None, device)
    new.bias = old.bias
    return new


def _find_layers(model: Any, embeddings: bool, keep: Collection[str]) -> Iterator[tuple[str, Any]]:
    kinds: dict[str, Any] = {}
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            kinds[path] = module
    full = {path: f"{model.base_model_prefix}.{path}" for path in kinds}
    stay = {path for path, name in full.items() if path in keep or name in keep}
    if not embeddings:
        stay |= {path for path, module in kinds.items() if isinstance(module, nn.Embedding)}
    floats = {id(kinds[path].weight) for path in stay}
    return ((path, module) for path, module in kinds.items() if id(module.weight) not in floats)


class _Method(StrEnum):
    """The name of the method as an enum member; transformers reads its `value`."""

    INT8 = METHOD


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json.

    Attributes:
        embeddings: True if embeddings are int8.
        keep: Paths of the layers that stay float, in the model with its task head.
    """

    def __init__(self, embeddings: bool = True, keep: Collection[str] = (), quant_method: str = METHOD) -> None:
        self.quant_method = _Method(quant_method)
        self.embeddings, self.keep = embeddings, sorted(keep)


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces a model's layers by int8 ones before transformers loads the weights."""

    is_trainable = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        put_int8_layers(model, self.quantization_config.embeddings, self.quantization_config.keep)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: a loaded model can be saved again."""
        return True
