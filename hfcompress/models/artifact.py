"""Model directories: opens, loads, saves and hashes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hfcompress.models.architectures import ARCHITECTURES, OWN_METHOD, PRUNED, UnsupportedError
from hfcompress.models.bounds import require_bounds
from hfcompress.models.foreign_directories import explain_missing_tokenizer, find_backbone
from hfcompress.models.loading_checks import require_complete_weights, require_finite_weights
from hfcompress.models.loading_report import loading_report, not_finite
from hfcompress.models.padding import pad_in_config, settle_padding
from hfcompress.models.save_tokenizer import save_tokenizer
from hfcompress.models.shape import Shape, count_labels, shape_of
from hfcompress.models.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    Choice,
    Runtime,
    Tensor,
    choose,
    files_of,
    names_in,
    onnx_dtype,
    openvino_dtype,
    read_headers,
    torch_dtype,
    weight_files,
)
from hfcompress.utils.errors import HfcompressError, require_directory
from hfcompress.utils.files import scratch_directory
from hfcompress.utils.hashing import SHORT, hash_pieces
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELING_FILE = "modeling_pruned.py"
CONFIG_BYTES = 64 << 20
"""The largest config.json that is read."""
VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json", "bpe.codes")
"""Files that tokenizers keep their vocabulary in."""
HALVES = ("float16", "bfloat16")
STORED_AS = "hfcompress_stored_as"
"""The key of config.json with the 16-bit type that a `quantize` stage chose; it stays with the model when it moves."""
FLOATS = ("float64", "float32", *HALVES)
"""The stored types that can be trained: they are loaded in float32."""


@dataclass(frozen=True)
class Artifact:
    """A model directory and its place in a run.

    Attributes:
        path: The directory, which `from_pretrained`, onnxruntime or OpenVINO loads.
        stage: `source`, or the stage that made it, such as `01-distill`.
        kind: `source`, `finetune`, `distill`, `prune`, `quantize` or `model`.
        shape: Its shape; None for an architecture (or a variant) that hfcompress can measure but not change.
        runtime: The library that runs it.
        dtype: The type that its weights are stored in.
        graph: The file of the graph that the user named, relative to the directory; empty if `choose` finds it.
    """

    path: Path
    stage: str
    kind: str
    shape: Shape | None
    runtime: Runtime
    dtype: str
    graph: str = ""

    @property
    def trainable(self) -> bool:
        """True if it can be trained or cut; weights of any float type are then loaded in float32."""
        return self.runtime == "torch" and self.dtype in FLOATS

    @property
    def choice(self) -> Choice:
        """The file that it is loaded from."""
        return choose(names_in(self.path), str(self.path), self.graph)

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        return [self.path / name for name in files_of(self.path, self.choice)]

    @property
    def disk_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(p.stat().st_size for p in self.weight_files)

    @property
    def is_pruned(self) -> bool:
        """True if no stock config can express its shape, so that a class of hfcompress's modeling file builds it."""
        return self.runtime == "torch" and str(read_config(self.path).get("model_type", "")).startswith(PRUNED)

    @property
    def needs_import(self) -> bool:
        """True if its quantized layers are hfcompress's own: transformers knows them after `import hfcompress`."""
        quantization = read_config(self.path).get("quantization_config") or {}
        return self.runtime == "torch" and str(quantization.get("quant_method", "")).startswith(OWN_METHOD)

    def computed_on(self, device: str) -> str:
        """Finds the type that it computes in when it is measured: the stored one, with one exception.

        On a CPU, a 16-bit model computes in float32 unless a quantize stage made it. Training on a CPU computes in
        float32 too, few CPUs have fast 16-bit kernels, and speed-ups over a slow source would look too large.
        """
        wide = device == "cpu" and self.kind != "quantize" and self.runtime == "torch" and self.dtype in HALVES
        return "float32" if wide or self.dtype == "float64" else self.dtype


def open_artifact(path: Path, stage: str = "source", kind: str | None = None, graph: str = "") -> Artifact:
    """Opens the model in a directory, without loading its weights.

    Args:
        path: The directory.
        stage: `source`, or the name of the stage that made it.
        kind: The kind of that stage; by default `quantize` if the directory says so, else `model`.
        graph: The file of a graph in it, if the user named one.

    Raises:
        HfcompressError: for a directory without config or weights, with pickled weights only, with incomplete files, or
            with a model that needs code of its own.
    """
    config = read_config(path)
    choice = choose(names_in(path), str(path), graph)
    log_graph_choice(str(path), choice)
    try:
        shape = shape_of(config)
    except UnsupportedError:
        require_bounds(config)
        shape = None
    files = files_of(path, choice)
    if choice.runtime == "torch":
        _require_known_code(path, config)
        tensors = read_headers(path, files)
        _require_plausible(path, config, shape, tensors)
        dtype = torch_dtype(config, tensors)
    else:
        dtype = (onnx_dtype if choice.runtime == "onnx" else openvino_dtype)(path / choice.file)
    chosen = config.get(STORED_AS) == dtype or _read_stage_kind(path) == "quantize"
    return Artifact(path, stage, kind or ("quantize" if chosen else "model"), shape, choice.runtime, dtype, graph)


@cache
def log_graph_choice(where: str, choice: Choice) -> None:
    """Logs once which of several graphs is used."""
    if choice.others:
        log.info(
            f"{where} holds {len(choice.others) + 1} graphs, and {choice.file} is used; "
            f"name another one as {where}:{choice.others[0]}"
        )


def _read_stage_kind(path: Path) -> str:
    """Reads the kind of stage that made a directory from its stage.json; empty if there is no stage.json."""
    try:
        return str(json.loads((path / "stage.json").read_text(encoding="utf-8"))["stage"]["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _require_known_code(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a model whose code is neither in transformers nor in hfcompress."""
    kind = str(config.get("model_type") or "")
    if kind.removeprefix(PRUNED) in ARCHITECTURES:  # transformers takes long to import, and `check` does without it
        return
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise HfcompressError(
            f"{path} is a '{kind[:60]}' model, whose code comes with it and is not in transformers; foreign code is "
            "not run",
            "export it to ONNX if you trust it, and name the graph; or use a model that transformers knows",
        )
    message = f"transformers knows no '{kind[:60]}' model" if kind else f"the config of {path} names no model_type"
    raise HfcompressError(message, "upgrade transformers, or use another model and its complete config.json")


def _require_plausible(
    path: Path, config: Mapping[str, Any], shape: Shape | None, tensors: Mapping[str, Tensor]
) -> None:
    """Refuses a config that claims far more weights than the files hold: loading would allocate memory for them."""
    quantized = bool(config.get("quantization_config"))
    stored = sum(tensor.count for tensor in tensors.values())
    claimed = shape.parameters if shape else _count_parameters(path)
    if claimed > 2 * stored * (16 if quantized else 1) + 10_000_000:
        raise HfcompressError(
            f"{path}: config.json describes {claimed:,} weights, and the files hold {stored:,}",
            "use the config.json that belongs to the weights, and fetch all of them",
        )
    whole = [n for n, t in tensors.items() if n.endswith(".weight") and t.dtype[0] in "IU" and len(t.shape) < 4]
    if whole and not quantized:
        raise HfcompressError(
            f"{path} stores {whole[0]} in integers ({tensors[whole[0]].dtype}), and config.json has no "
            "quantization_config that says what they mean",
            "use the config.json that was saved with the weights",
        )


def _count_parameters(path: Path) -> int:
    """Counts the weights of an architecture that only transformers knows, without making them."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return sum(p.numel() for p in AutoModel.from_config(config, trust_remote_code=False).parameters())
    except HfcompressError:
        raise
    except Exception as error:  # a wrong value in a config raises any exception where it is used
        raise HfcompressError(
            f"{path}: transformers cannot make a model from its config.json: {_first_line(error)}", "use a complete one"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Reads the config.json of a model directory.

    Raises:
        HfcompressError: if there is none, or it is not JSON.
    """
    file = require_directory(path, "model directory") / "config.json"
    if not file.is_file():
        if file.exists():
            raise HfcompressError(f"{file} is not a file", "a model directory is what save_pretrained writes")
        if (path / ADAPTER_CONFIG).is_file():
            choose(names_in(path), str(path))
        backbone = find_backbone(path)
        raise HfcompressError(
            f"{path} holds no config.json",
            f"its transformer, without a task head, is {backbone}; name that, and put a `finetune` stage first"
            if backbone
            else "a model directory is what save_pretrained writes",
        )
    if file.stat().st_size > CONFIG_BYTES:
        raise HfcompressError(f"{file} has {file.stat().st_size:,} bytes, which no model's config has")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise HfcompressError(f"{file} is nested too deeply") from None
    except ValueError as error:  # also for bytes that are not UTF-8, and numbers of too many digits
        raise HfcompressError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise HfcompressError(f"{file} is not a JSON object")
    return config


def label_ids(config: Mapping[str, Any]) -> dict[str, int]:
    """Reads the label names and ids of the task head; a config leaves transformers' default names out.

    Raises:
        HfcompressError: if the names and the ids do not match one to one, or if there are too many.
    """
    names = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count_labels(config))}
    fix = "`id2label` in config.json gives each output, from 0 on, a name of its own"
    try:
        found = {str(name): int(index) for index, name in names.items()}
    except (AttributeError, TypeError, ValueError):
        raise HfcompressError(f"the model's id2label is no list of ids and names: {str(names)[:120]}", fix) from None
    if len(found) < len(names) or sorted(found.values()) != list(range(len(found))):
        raise HfcompressError(f"the model's id2label does not name each output once: {str(names)[:120]}", fix)
    return found


def weights_hash(path: Path) -> str:
    """Hashes the weights and config of a model directory, or the weights of an adapter directory."""
    names = [name for name in weight_files(path) if not name.startswith(f"{ADAPTER}/")]
    files = [path / name for name in sorted({*names, "config.json"}) if (path / name).is_file()]
    files += sorted((path / ADAPTER).glob("adapter_*"))
    return hash_pieces(piece for file in files for piece in _name_and_content(file))[:SHORT]


def _name_and_content(file: Path) -> Iterator[str | bytes]:
    yield file.name
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            yield block


@cache
def _log_float32(path: Path, dtype: str) -> None:
    """Logs once that a model's 16-bit weights are loaded in float32."""
    log.info(
        f"{path} is stored in {dtype}; it is loaded in float32, and `train.precision` says what training computes in"
    )


def load_model(path: Path, auto_class: str, fresh_head: bool = False, **changes: Any) -> PreTrainedModel:
    """Loads the model of a directory, in float32 and eval mode, for training, cutting or quantizing.

    Args:
        path: The directory.
        auto_class: The class to load it with, such as `AutoModelForSequenceClassification`.
        fresh_head: Initialize a task head that the checkpoint lacks, or that has another size.
        **changes: Config values to set.

    Raises:
        HfcompressError: if it does not load, or if the checkpoint lacks weights other than those of a fresh task head.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    artifact, config = open_artifact(path), read_config(path)
    if artifact.dtype in HALVES:
        _log_float32(path, artifact.dtype)
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Weights of other sizes are checked below, by name.
            ignore_mismatched_sizes=not config.get("quantization_config"),
            **find_missing_config(path) | changes,
        )
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise HfcompressError(f"{path} does not load as {auto_class}: {_first_line(error)}") from error
    require_complete_weights(path, auto_class, loading_report(model, info), config, fresh_head)
    model.config.architectures = [type(model).__name__]  # it named the class of the checkpoint's task head
    return model.eval()


def load_finite_model(path: Path, auto_class: str, fresh_head: bool = False, **changes: Any) -> PreTrainedModel:
    """Loads a model like `load_model`, for training or as a teacher; all its weights must be finite.

    Raises:
        HfcompressError: also for weights that are NaN or infinite.
    """
    model = load_model(path, auto_class, fresh_head, **changes)
    require_finite_weights(path, not_finite(model))
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class TextReader(Protocol):
    """A task, as far as a tokenizer needs to know it."""

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Sets the tokenizer's options as the task needs them, in place; true if that changed it."""


def load_tokenizer(path: Path, task: TextReader | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a directory, with the model's pad token and the options that a task needs.

    Training, measuring and saving all use this function. A changed tokenizer is saved and loaded again, so that a saved
    copy tokenizes in the same way.

    Args:
        path: The directory.
        task: The task that the texts are for; None for texts of no task.

    Raises:
        HfcompressError: if there is no tokenizer that loads, or no pad token.
    """
    tokenizer = _tokenizer_in(path)
    changed = (path / "config.json").is_file() and settle_padding(tokenizer, read_config(path), path)
    if task is not None:
        changed = task.prepare_tokenizer(tokenizer) or changed
    if not changed:
        return tokenizer
    with scratch_directory() as folder:
        tokenizer.save_pretrained(folder)
        found = _tokenizer_in(folder)
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

    fix = explain_missing_tokenizer(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions for files that it cannot read
        raise HfcompressError(f"{path} holds no tokenizer that loads: {_first_line(error)}", fix) from error
    # Without files transformers makes a tokenizer without words; tokenizers of bytes need no files.
    if not any(file for pattern in VOCABULARIES for file in path.glob(pattern)) and len(tokenizer) < 256:
        raise HfcompressError(f"{path} holds no tokenizer that loads: it has no vocabulary", fix)
    return tokenizer


def pad_token_of(path: Path) -> int | None:
    """Finds the id of a model's pad token: its config's, or its tokenizer's if the config names none."""
    named = pad_in_config(read_config(path))
    return _tokenizer_in(path).pad_token_id if named is None and _has_tokenizer(path) else named


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()


def find_missing_config(path: Path) -> dict[str, Any]:
    """Finds the values that `from_pretrained` needs and the config lacks: the pad token."""
    pad = pad_token_of(path)
    return {} if pad is None or pad == pad_in_config(read_config(path)) else {"pad_token_id": pad}


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Writes weights (safetensors), config and tokenizer, and the modeling file for a pruned shape."""
    save_weights(model, path)
    save_tokenizer(tokenizer, path)


def save_weights(model: PreTrainedModel, path: Path) -> None:
    """Writes the same as `save_model`, except for the tokenizer."""
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
    """Writes the `problem_type` of a task into a model's config.json; a pipeline needs it to compute scores."""
    config = read_config(path)
    if problem_type is None or config.get("problem_type") == problem_type:
        return
    text = json.dumps({**config, "problem_type": problem_type}, indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def modeling_source() -> Path:
    """Finds the modeling file that is copied beside a pruned model."""
    return Path(__file__).with_name("modeling_pruned.py")
