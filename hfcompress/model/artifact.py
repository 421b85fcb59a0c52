"""A model directory: how it is opened, loaded, saved and told from another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.base.errors import HfcompressError, require_directory
from hfcompress.base.shape import PRUNED, Shape, UnsupportedError, shape_of
from hfcompress.model.padding import pad_in_config, settle_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELING_FILE = "modeling_pruned.py"
ADAPTER = "adapter"
"""Where a quantized model keeps the adapters that were trained on it, as peft saves them."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")


@dataclass(frozen=True)
class Artifact:
    """A model directory and where it stands in a run.

    Attributes:
        path: The directory; what `from_pretrained`, onnxruntime or OpenVINO loads.
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
    runtime: Literal["torch", "onnx", "openvino"]
    dtype: str

    @property
    def quantized(self) -> bool:
        """Whether it can no longer be trained."""
        return self.dtype != "float32"

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.runtime == "openvino":
            graph = next(iter(_openvino_graphs(self.path)))
            return [graph.with_suffix(".bin"), graph]
        if self.runtime == "onnx":
            return sorted(self.path.glob("*.onnx"))
        return sorted(file for folder in (self.path, self.path / ADAPTER) for file in folder.glob("*.safetensors"))

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
    torch = any(path.glob("*.safetensors"))
    onnx = None if torch else next(iter(sorted(path.glob("*.onnx"))), None)
    openvino = None if torch or onnx else next(iter(_openvino_graphs(path)), None)
    try:
        shape = shape_of(config)
    except UnsupportedError:
        shape = None
    return Artifact(
        path=path,
        stage=stage,
        kind=kind,
        shape=shape,
        runtime="onnx" if onnx else "openvino" if openvino else "torch",
        dtype=_onnx_dtype(onnx) if onnx else _openvino_dtype(openvino) if openvino else _torch_dtype(config),
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
    """The head's label names and ids; a config with transformers' default names does not spell them.

    Raises:
        HfcompressError: for names that are not one for each id.
    """
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    fix = "`id2label` in config.json gives each output, from 0 on, a name of its own"
    try:
        found = {str(name): int(index) for index, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise HfcompressError(f"the model's id2label is no list of ids and names: {str(names)[:120]}", fix) from None
    if len(found) < len(names) or sorted(found.values()) != list(range(len(found))):
        raise HfcompressError(f"the model's id2label does not name each output once: {str(names)[:120]}", fix)
    return found


def require_weights(path: Path) -> None:
    """Passes where a model directory holds safetensors, ONNX or OpenVINO weights.

    Raises:
        HfcompressError: where it holds none, or pickles only.
    """
    require_weight_names([p.name for p in path.iterdir()], str(path))


def require_weight_names(names: list[str], path: str) -> None:
    """Passes where one of the files of a model, by their names, holds safetensors, ONNX or OpenVINO weights.

    Args:
        names: The files.
        path: Where they are; for the message.

    Raises:
        HfcompressError: where none does, or pickles only.
    """
    if any(name.endswith((".safetensors", ".onnx")) for name in names) or openvino_files(names):
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


def openvino_files(names: Iterable[str]) -> list[str]:
    """OpenVINO's files among the names: `.xml` graphs and, each beside its own, the raw tensors in a `.bin`."""
    known = set(names)
    graphs = sorted(name.removesuffix(".xml") for name in known if name.endswith(".xml"))
    return [graph + end for graph in graphs if f"{graph}.bin" in known for end in (".bin", ".xml")]


def _openvino_graphs(path: Path) -> list[Path]:
    return [path / name for name in openvino_files(p.name for p in path.iterdir()) if name.endswith(".xml")]


def _torch_dtype(config: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if quantization:
        if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
            return str(quantization.get("bnb_4bit_quant_type", "fp4"))
        # GPTQ and AWQ say the bits; torchao spells out a config, data types and all.
        four = quantization.get("bits") == 4 or "'int4'" in str(quantization.get("quant_type"))
        return "int4" if four else "int8"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _onnx_dtype(path: Path) -> str:
    """What the linear layers' weights are stored as; where they are floats, what the embedding tables are."""
    import onnx

    kinds = onnx.TensorProto
    graph = onnx.load(str(path), load_external_data=False).graph
    # Scales and zero points have one axis at most.
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1}
    words = {node.input[0] for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized")}
    if any(x.op_type == "MatMulNBits" and onnx.helper.get_node_attr_value(x, "bits") == 4 for x in graph.node):
        return "int4"
    for names in (stored.keys() - words, words & stored.keys()):
        found = {stored[name] for name in names}
        if found & {kinds.INT4, kinds.UINT4}:
            return "int4"
        if found & {kinds.INT8, kinds.UINT8}:
            return "int8"
    return "float16" if kinds.FLOAT16 in stored.values() else "float32"


def _openvino_dtype(path: Path) -> str:
    """The fewest bits that a tensor of more than one value is stored in."""
    from xml.etree import ElementTree

    kinds = {
        data.get("element_type")
        for data in ElementTree.parse(path).getroot().iterfind("layers/layer[@type='Const']/data")
        if int(data.get("size", 0)) > 8
    }
    stored = (("int4", {"i4", "u4", "nf4"}), ("int8", {"i8", "u8"}), ("float16", {"f16"}), ("bfloat16", {"bf16"}))
    return next((dtype for dtype, names in stored if kinds & names), "float32")


def weights_hash(path: Path) -> str:
    """A hash of the weights and config of a model directory."""
    digest = hashlib.sha256()
    names = [p.name for p in path.iterdir()]
    weights = {name for name in names if name.endswith((".safetensors", ".onnx"))} | {*openvino_files(names)}
    files = [path / name for name in sorted(names) if name in weights or name == "config.json"]
    files += sorted((path / ADAPTER).glob("adapter_*"))
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
            **settled_config(path) | changes,
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


def load_tokenizer(path: Path, task: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, padding as the model there does, and reading as a task reads.

    Training, measuring and saving go through this one function. What it changes has been through `save_pretrained`
    and back, so that a saved copy reads as this one does.

    Args:
        path: The directory.
        task: What the texts are read for; None for what is no task's.

    Raises:
        HfcompressError: where there is none that can be loaded, or nobody can tell what pads.
    """
    tokenizer = _tokenizer_in(path)
    changed = (path / "config.json").is_file() and settle_padding(tokenizer, read_config(path), path)
    if task is not None:
        changed = task.prepare_tokenizer(tokenizer) or changed
    if not changed:
        return tokenizer
    with TemporaryDirectory(prefix="hfcompress-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        found = _tokenizer_in(Path(folder))
    if (found.pad_token_id, found.padding_side) != (tokenizer.pad_token_id, "right") or (
        task is not None and task.prepare_tokenizer(found)
    ):
        raise HfcompressError(
            f"the tokenizer of {path} ({type(found).__name__}) does not keep its pad token or the space before a first "
            "word when it is saved",
            "set `pad_token` and `add_prefix_space` in its tokenizer_config.json",
        )
    found.name_or_path = tokenizer.name_or_path
    return found


def _tokenizer_in(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise HfcompressError(f"{path} holds no tokenizer that loads: {_first_line(error)}") from error


def pad_token_of(path: Path) -> int | None:
    """The id that the model in a directory pads with: its config's, or its tokenizer's where the config names none."""
    named = pad_in_config(read_config(path))
    return _tokenizer_in(path).pad_token_id if named is None and _has_tokenizer(path) else named


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()


def settled_config(path: Path) -> dict[str, Any]:
    """What the config of a model directory has to be told when the model is loaded: the pad token, if it names none."""
    pad = pad_token_of(path)
    return {} if pad is None or pad == pad_in_config(read_config(path)) else {"pad_token_id": pad}


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


def note_problem_type(path: Path, problem_type: str | None) -> None:
    """Writes into a model's config.json what its outputs are, where a task knows; a pipeline needs it for scores."""
    config = read_config(path)
    if problem_type is None or config.get("problem_type") == problem_type:
        return
    text = json.dumps({**config, "problem_type": problem_type}, indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def modeling_source() -> Path:
    """The modeling file that is copied beside a pruned model."""
    return Path(__file__).with_name("pruned.py")
