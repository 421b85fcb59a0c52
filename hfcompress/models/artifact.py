"""A model directory: how it is opened, loaded, saved and told from another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hfcompress.models.architectures import ARCHITECTURES, PRUNED, UnsupportedError
from hfcompress.models.bounds import require_bounds
from hfcompress.models.loading_checks import require_complete_weights, require_finite_weights
from hfcompress.models.loading_report import loading_report, not_finite
from hfcompress.models.padding import pad_in_config, settle_padding
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
"""Key of config.json that says which 16-bit type a `quantize` stage chose; it stays with the model when it is moved."""
FLOATS = ("float64", "float32", *HALVES)
"""Stored types that can be trained: they are loaded in float32."""


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
        graph: The graph that was named, relative to the directory; empty if `choose` finds the one that is meant.
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
        """True if it can be trained or cut. Weights of any float type are loaded in float32 for that."""
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

    def computed_on(self, device: str) -> str:
        """The type that it computes in when it is measured.

        As it is stored, but for a 16-bit model on a CPU that no quantize stage made: training computes in float32
        there, few CPUs have fast kernels for less, and a source that they slow down would flatter what is made of it.
        """
        wide = device == "cpu" and self.kind != "quantize" and self.runtime == "torch" and self.dtype in HALVES
        return "float32" if wide or self.dtype == "float64" else self.dtype


def open_artifact(path: Path, stage: str = "source", kind: str | None = None, graph: str = "") -> Artifact:
    """The artifact in a directory.

    Args:
        path: The directory.
        stage: `source`, or the stage that made it.
        kind: The kind of that stage; by default `quantize` if the directory says so, else `model`.
        graph: The file of a graph in it, where that one is meant.

    Raises:
        HfcompressError: for a directory without config or weights, with pickled weights only, with files that are cut
            off, or of a model that takes code of its own.
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
    """Says once which of several graphs is used."""
    if choice.others:
        log.info(
            f"{where} holds {len(choice.others) + 1} graphs, and {choice.file} is the one that is used; "
            f"another one is named as {where}:{choice.others[0]}"
        )


def _read_stage_kind(path: Path) -> str:
    """The kind of stage that made a directory, as its stage.json says; empty if there is no stage.json."""
    try:
        return str(json.loads((path / "stage.json").read_text(encoding="utf-8"))["stage"]["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _require_known_code(path: Path, config: Mapping[str, Any]) -> None:
    """Requires a model whose code transformers or hfcompress has."""
    kind = str(config.get("model_type") or "")
    if kind.removeprefix(PRUNED) in ARCHITECTURES:  # transformers takes long to import, and `check` does without it
        return
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return
    if config.get("auto_map"):
        raise HfcompressError(
            f"{path} is a '{kind[:60]}' model, whose code is not transformers' but comes with it, and foreign code is "
            "not run",
            "export it to ONNX where you trust it, and name the graph; or use a model that transformers knows",
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
            f"{path}: config.json tells of {claimed:,} weights, and the files hold {stored:,}",
            "use the config.json that belongs to the weights, and fetch all of them",
        )
    whole = [n for n, t in tensors.items() if n.endswith(".weight") and t.dtype[0] in "IU" and len(t.shape) < 4]
    if whole and not quantized:
        raise HfcompressError(
            f"{path} stores {whole[0]} in whole numbers ({tensors[whole[0]].dtype}), and config.json has no "
            "quantization_config that says what they stand for",
            "use the config.json that was saved with the weights",
        )


def _count_parameters(path: Path) -> int:
    """Weights of the model of a config.json, of an architecture that only transformers knows; none are made."""
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            return sum(p.numel() for p in AutoModel.from_config(config, trust_remote_code=False).parameters())
    except HfcompressError:
        raise
    except Exception as error:  # a config's values fail where they are used, as whatever that raises
        raise HfcompressError(
            f"{path}: transformers makes no model of its config.json: {_first_line(error)}", "use a complete one"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model directory.

    Raises:
        HfcompressError: if there is none, or it is not JSON.
    """
    file = require_directory(path, "model directory") / "config.json"
    if not file.is_file():
        if file.exists():
            raise HfcompressError(f"{file} is not a file", "a model directory is what save_pretrained writes")
        if (path / ADAPTER_CONFIG).is_file():
            choose(names_in(path), str(path))
        raise HfcompressError(f"{path} holds no config.json", "a model directory is what save_pretrained writes")
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
    """The head's label names and ids; a config with transformers' default names does not spell them.

    Raises:
        HfcompressError: for names that are not one for each id, or too many.
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
    """A hash of the weights and config of a model directory, or of the weights of an adapter's."""
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
    """Says once that a model's 16-bit weights are made float32."""
    log.info(
        f"{path} is stored in {dtype}; it is loaded in float32, and `train.precision` says what training computes in"
    )


def load_model(path: Path, auto_class: str, fresh_head: bool = False, **changes: Any) -> PreTrainedModel:
    """The model of a directory, in float32 and eval mode, for training, cutting or quantizing.

    Args:
        path: The directory.
        auto_class: Such as `AutoModelForSequenceClassification`.
        fresh_head: Initialise a head that the checkpoint lacks, or that has another size.
        **changes: Config values to set.

    Raises:
        HfcompressError: if it does not load, or if the checkpoint lacks weights other than those of a fresh task
            head.
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
            # What has another size is judged below, by name.
            ignore_mismatched_sizes=not config.get("quantization_config"),
            **find_missing_config(path) | changes,
        )
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise HfcompressError(f"{path} does not load as {auto_class}: {_first_line(error)}") from error
    require_complete_weights(path, auto_class, loading_report(model, info), config, fresh_head)
    model.config.architectures = [type(model).__name__]  # of a checkpoint with another head it named that one's class
    return model.eval()


def load_finite_model(path: Path, auto_class: str, fresh_head: bool = False, **changes: Any) -> PreTrainedModel:
    """Loads a model to train it, or to learn from it: `load_model`, and all weights must be numbers.

    Raises:
        HfcompressError: also where weights are NaN or infinite.
    """
    model = load_model(path, auto_class, fresh_head, **changes)
    require_finite_weights(path, not_finite(model))
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class TextReader(Protocol):
    """What texts are read for: a task, as far as a tokenizer is concerned."""

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Makes a tokenizer read as the task reads, in place; true if that changed it."""


def load_tokenizer(path: Path, task: TextReader | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, padding as the model there does, and reading as a task reads.

    Training, measuring and saving go through this one function. What it changes has been through `save_pretrained`
    and back, so that a saved copy reads as this one does.

    Args:
        path: The directory.
        task: What the texts are read for; None for what is no task's.

    Raises:
        HfcompressError: if none can be loaded, or no pad token can be found.
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

    fix = "put the tokenizer's files, as save_pretrained writes them, beside the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions for files that it cannot read
        raise HfcompressError(f"{path} holds no tokenizer that loads: {_first_line(error)}", fix) from error
    # Without files transformers makes one up that knows no word; tokenizers of bytes need none.
    if not any(file for pattern in VOCABULARIES for file in path.glob(pattern)) and len(tokenizer) < 256:
        raise HfcompressError(f"{path} holds no tokenizer that loads: it has no vocabulary", fix)
    return tokenizer


def pad_token_of(path: Path) -> int | None:
    """The id of a model's pad token: its config's, or its tokenizer's if the config names none."""
    named = pad_in_config(read_config(path))
    return _tokenizer_in(path).pad_token_id if named is None and _has_tokenizer(path) else named


def _has_tokenizer(path: Path) -> bool:
    return (path / "tokenizer_config.json").is_file() or (path / "tokenizer.json").is_file()


def find_missing_config(path: Path) -> dict[str, Any]:
    """The values that a config lacks and that `from_pretrained` needs: the pad token."""
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
    """Writes the `problem_type` of a task into a model's config.json, which a pipeline needs to compute scores."""
    config = read_config(path)
    if problem_type is None or config.get("problem_type") == problem_type:
        return
    text = json.dumps({**config, "problem_type": problem_type}, indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")


def modeling_source() -> Path:
    """The modeling file that is copied beside a pruned model."""
    return Path(__file__).with_name("modeling_pruned.py")
