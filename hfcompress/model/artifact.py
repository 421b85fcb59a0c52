"""A model directory: how it is opened, loaded, saved and told from another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.base.errors import HfcompressError, require_directory
from hfcompress.base.shape import PRUNED, Shape, UnsupportedError, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELING_FILE = "modeling_pruned.py"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")


@dataclass(frozen=True)
class Artifact:
    """A model directory and where it stands in a run.

    Attributes:
        path: The directory; what `from_pretrained` (or onnxruntime) loads.
        stage: `source`, or the stage that made it, such as `01-distill`.
        kind: `source`, `finetune`, `distill`, `prune`, `quantize` or `model`.
        shape: Its shape; None for an architecture (or a variant) that hfcompress measures but cannot take apart.
        runtime: What runs it.
        dtype: What its weights are stored as.
    """

    path: Path
    stage: str
    kind: str
    shape: Shape | None
    runtime: Literal["torch", "onnx"]
    dtype: str

    @property
    def quantized(self) -> bool:
        """Whether it can no longer be trained."""
        return self.dtype != "float32"

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted(self.path.glob("*.onnx" if self.runtime == "onnx" else "*.safetensors"))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(p.stat().st_size for p in self.weight_files)


def open_artifact(path: Path, stage: str = "source", kind: str = "model") -> Artifact:
    """The artifact in a directory.

    Raises:
        HfcompressError: for a directory without config or weights, or with pickled weights only.
    """
    config = read_config(path)
    require_weights(path)
    # A Hub repository may hold both; the safetensors can be trained and cut.
    onnx = None if any(path.glob("*.safetensors")) else next(iter(sorted(path.glob("*.onnx"))), None)
    try:
        shape = shape_of(config)
    except UnsupportedError:
        shape = None
    return Artifact(
        path=path,
        stage=stage,
        kind=kind,
        shape=shape,
        runtime="onnx" if onnx else "torch",
        dtype=_onnx_dtype(onnx) if onnx else _torch_dtype(config),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        HfcompressError: where there is none, or it is not JSON.
    """
    file = require_directory(path, "model directory") / "config.json"
    if not file.is_file():
        raise HfcompressError(f"{path} holds no config.json", "a model directory is what save_pretrained writes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HfcompressError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise HfcompressError(f"{file} is not a JSON object")
    return config


def label_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """The head's label names and ids; a config with transformers' default names does not spell them."""
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    return {str(name): int(index) for index, name in names.items()}


def require_weights(path: Path) -> None:
    """Passes where a model directory holds safetensors or ONNX weights.

    Raises:
        HfcompressError: where it holds none, or pickles only.
    """
    require_weight_names([p.name for p in path.iterdir()], str(path))


def require_weight_names(names: list[str], path: str) -> None:
    """Passes where one of the files of a model, by their names, holds safetensors or ONNX weights.

    Args:
        names: The files.
        path: Where they are; for the message.

    Raises:
        HfcompressError: where none does, or pickles only.
    """
    if any(name.endswith((".safetensors", ".onnx")) for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise HfcompressError(
            f"{path} holds pickled weights only ({', '.join(pickles)}); a pickle can run code, so it is not loaded",
            "convert them once where you trust the source: "
            "AutoModel.from_pretrained(PATH).save_pretrained(PATH, safe_serialization=True); "
            "for a Hub model, look for a converted revision and name it as `id@refs/pr/N`",
        )
    raise HfcompressError(f"{path} holds no weights", "a model.safetensors (or model.onnx) belongs beside config.json")


def _torch_dtype(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if quantization:
        four = quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")
        return str(quantization.get("bnb_4bit_quant_type", "fp4")) if four else "int8"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _onnx_dtype(path: Path) -> str:
    import onnx

    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    kinds = {tensor.data_type for tensor in tensors}
    if kinds & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}:
        return "int8"
    return "float16" if onnx.TensorProto.FLOAT16 in kinds else "float32"


def weights_hash(path: Path) -> str:
    """A hash of the weights and config of a model directory."""
    digest = hashlib.sha256()
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".onnx") or p.name == "config.json"]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def load_model(path: Path, auto_class: str, fresh_head: bool = False, **changes: Any) -> PreTrainedModel:
    """The model of a directory, in float32 and eval mode, for training, cutting or quantizing.

    Args:
        path: The directory.
        auto_class: Such as `AutoModelForSequenceClassification`.
        fresh_head: Initialise a head that the checkpoint lacks, or that has another size.
        **changes: Config values to set.

    Raises:
        HfcompressError: where weights are missing from the checkpoint that are not a fresh head's.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    require_weights(path)
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=fresh_head,
            **changes,
        )
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise HfcompressError(f"{path} does not load as {auto_class}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    body = f"{model.base_model_prefix}."
    if any(name.startswith(body) and ".pooler." not in name for name in missing) or (missing and not fresh_head):
        raise HfcompressError(
            f"{path} lacks {len(missing)} of the weights that {auto_class} needs ({', '.join(missing[:4])}"
            f"{', …' if len(missing) > 4 else ''}): its head was never trained",
            "put a `finetune` stage first, or name a model that was fine-tuned for this task",
        )
    return model.eval()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Raises:
        HfcompressError: where there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HfcompressError(f"{path} holds no tokenizer that loads: {_first_line(error)}") from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes weights (safetensors), config, tokenizer and, for a pruned shape, the modeling file beside them."""
    save_weights(model, path)
    tokenizer.save_pretrained(path)


def save_weights(model: PreTrainedModel, path: Path) -> None:
    """`save_model` without the tokenizer."""
    name = type(model).__name__
    if str(model.config.model_type).startswith(PRUNED):
        stem = MODELING_FILE.removesuffix(".py")
        head = name.partition("For")
        model.config.auto_map = {
            "AutoConfig": f"{stem}.{type(model.config).__name__}",
            "AutoModel" + head[1] + head[2]: f"{stem}.{name}",
        }
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    if str(model.config.model_type).startswith(PRUNED):
        shutil.copyfile(modeling_source(), path / MODELING_FILE)


def modeling_source() -> Path:
    """The modeling file that is copied beside a pruned model."""
    return Path(__file__).with_name("pruned.py")
