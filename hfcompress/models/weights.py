"""Finds the weight files of a model directory, and reads their headers without loading weights."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hfcompress.utils.errors import HfcompressError, did_you_mean

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

Runtime = Literal["torch", "onnx", "openvino"]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter"
"""The subdirectory of a quantized model with the adapters that were trained on it, as peft saves them."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES, OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl"), (".h5", ".msgpack")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
"""The names of pickled weights in transformers; `convert --allow-pickle` reads them."""
FOLDERS = ("onnx", "openvino")
"""The folders with graphs in a model directory or in a repository on the Hub."""
GRAPH_FILES = {
    "float32": "onnx/model.onnx",
    "float16": "onnx/model_fp16.onnx",
    "int8": "onnx/model_quantized.onnx",
    "int4": "onnx/model_q4.onnx",
}
"""The file of an ONNX graph in a model directory, by the type of its weights: where Transformers.js looks for it."""
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2"}  # fmt: skip
INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class Choice:
    """The file that a model is loaded from.

    Attributes:
        runtime: The library that runs it.
        file: The file, relative to the directory.
        others: The other graphs in the same folder.
    """

    runtime: Runtime
    file: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, as the header of its file describes it.

    Attributes:
        dtype: The type, named as in safetensors, such as `BF16`.
        shape: The sizes of its axes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes that it takes in the file."""
        bits = re.search(r"\d+", self.dtype)
        return self.count * (int(bits[0]) if bits else 8) // 8  # BOOL takes a byte


def names_in(path: Path) -> list[str]:
    """Lists the files of a model directory and of its folders with graphs, relative to it."""
    folders = [path, *(path / name for name in FOLDERS if (path / name).is_dir())]
    return sorted(
        file.relative_to(path).as_posix() for folder in folders for file in folder.iterdir() if file.is_file()
    )


def choose(names: Collection[str], where: str, graph: str = "") -> Choice:
    """Chooses the file that a model is loaded from, by the names of its files.

    The order is: the graph that the user named; `model.safetensors`, or the index of its shards; `model.onnx`, or the
    only ONNX graph; `openvino_model.xml`, or the only OpenVINO graph. Graphs are searched in the directory, then in its
    `onnx/` or `openvino/`.

    Args:
        names: The files, relative to the directory.
        where: The directory or Hub id, for messages.
        graph: The file that the user named, if any.

    Raises:
        HfcompressError: if there is nothing to load, or if the choice is not clear.
    """
    graphs = {"onnx": [n for n in names if n.endswith(".onnx")], "openvino": _xml_files(names)}
    if graph:
        return _choose_named(graph, graphs, where)
    if ADAPTER_CONFIG in names:
        raise HfcompressError(
            f"{where} is a peft adapter, or has one beside its weights, which would load as another model",
            "merge it into its base (merge_and_unload(), save_pretrained), or name it as a `teacher` or as a student's "
            "`from`, which merge it; delete adapter_config.json if it belongs to nothing",
        )
    whole = next((name for name in (WHOLE, INDEX) if name in names), None)
    if whole is not None:
        return Choice("torch", whole)
    runtimes: tuple[tuple[Runtime, str], ...] = (("onnx", "model.onnx"), ("openvino", "openvino_model.xml"))
    for runtime, usual in runtimes:
        for folder in ("", f"{runtime}/"):
            found = sorted(n for n in graphs[runtime] if n.startswith(folder) and "/" not in n.removeprefix(folder))
            if found:
                return _choose_graph(runtime, folder + usual, found, where)
    raise _no_weights(names, where)


def _choose_named(graph: str, graphs: Mapping[str, list[str]], where: str) -> Choice:
    known = [*graphs["onnx"], *graphs["openvino"]]
    if graph not in known:
        offer = did_you_mean(graph, known) if known else "it holds none"
        raise HfcompressError(f"{where} holds no graph '{graph}'", offer)
    return Choice("onnx" if graph in graphs["onnx"] else "openvino", graph)


def _choose_graph(runtime: Runtime, usual: str, found: list[str], where: str) -> Choice:
    if len(found) > 1 and usual not in found:
        raise HfcompressError(
            f"{where} holds several graphs, and none is called {usual}: {', '.join(found)}",
            f"name one of them, such as {where}:{found[0]}",
        )
    file = usual if usual in found else found[0]
    return Choice(runtime, file, tuple(name for name in found if name != file))


def _no_weights(names: Collection[str], where: str) -> HfcompressError:
    stray = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    pickles = sorted(name for name in names if name.endswith(PICKLES) and "/" not in name)
    if pickles:
        return HfcompressError(
            f"{where} holds pickled weights only ({', '.join(pickles)}); a pickle can run code, so it is not loaded",
            f"`hfcompress convert {where} NEW --allow-pickle` reads its tensors and no code, and writes safetensors; "
            "for a Hub model, look for a converted revision and name it as `id@refs/pr/N`",
        )
    others = sorted(name for name in names if name.endswith(OTHERS) and "/" not in name)
    if others:
        return HfcompressError(
            f"{where} holds weights of TensorFlow or Flax only ({', '.join(others)})",
            "look for a repository, or a revision (`id@refs/pr/N`), with model.safetensors",
        )
    if stray:
        return HfcompressError(
            f"{where} holds {', '.join(stray)}, and neither {WHOLE} nor {INDEX}: it is not clear which of them to load",
            f"rename the file with the whole model to {WHOLE}, or put the index beside its shards",
        )
    return HfcompressError(
        f"{where} holds no weights", "a model.safetensors (or onnx/model.onnx) belongs beside config.json"
    )


def openvino_files(names: Iterable[str]) -> list[str]:
    """Selects OpenVINO's files: each graph in an `.xml` with a `.bin` of its tensors beside it."""
    return [graph.removesuffix(".xml") + end for graph in _xml_files(names) for end in (".bin", ".xml")]


def _xml_files(names: Iterable[str]) -> list[str]:
    known = set(names)
    return sorted(n for n in known if n.endswith(".xml") and f"{n.removesuffix('.xml')}.bin" in known)


def weight_files(path: Path, graph: str = "") -> list[str]:
    """Lists the files with the weights of the model that loads from a directory, relative to it.

    The shards of an index and the external data of a graph are included; other formats, variants, adapters of other
    models and leftovers are not.

    Args:
        path: The directory.
        graph: The graph that the user named, if any.

    Raises:
        HfcompressError: if there is nothing to load, or if a part is missing.
    """
    if (path / ADAPTER_CONFIG).is_file() and (path / ADAPTER_WEIGHTS).is_file() and not (path / WHOLE).is_file():
        return [ADAPTER_WEIGHTS]
    return files_of(path, choose(names_in(path), str(path), graph))


def files_of(path: Path, choice: Choice) -> list[str]:
    """Lists the files with the weights of a choice, relative to the directory."""
    if choice.file == INDEX:
        found = _shards(path)
    elif choice.runtime == "onnx":
        found = [choice.file, *external_files(path, choice.file)]
    elif choice.runtime == "openvino":
        found = [choice.file.removesuffix(".xml") + ".bin", choice.file]
    else:
        found = [choice.file]
    adapter = f"{ADAPTER}/{ADAPTER_WEIGHTS}"
    return found + ([adapter] if choice.runtime == "torch" and (path / adapter).is_file() else [])


def _shards(path: Path) -> list[str]:
    """Lists the shards that the index of a model names."""
    index = path / INDEX
    if index.stat().st_size > INDEX_BYTES:
        raise HfcompressError(f"{index} has {index.stat().st_size:,} bytes, which is too many for an index")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]  # transformers reads it
        names = set(content["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HfcompressError(f"{index} is not the index of a model's shards: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise HfcompressError(f"{index} names {name!r}, which is no safetensors file beside it")
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing or not names:
        what = f"names {', '.join(missing[:4])}, which {path} does not hold" if missing else "names no file"
        raise HfcompressError(f"{index} {what}", "fetch the shards that are missing")
    return sorted(names)


# Reading headers


def read_header(file: Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file, without loading tensors.

    Raises:
        HfcompressError: for an incomplete or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as stored:  # it refuses a header that does not fit the file
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            return {name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise HfcompressError(
            f"{file} is not a complete safetensors file: {error}", "fetch or save it again: it is incomplete or damaged"
        ) from None


def read_headers(path: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """Reads the headers of the safetensors files among `files`, without those of adapters."""
    found: dict[str, Tensor] = {}
    for name in files:
        if name.endswith(".safetensors") and "/" not in name:
            found |= read_header(path / name)
    return found


def torch_dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Finds the stored type of a PyTorch model: that of its quantization, else the float type of most weights."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization:
        if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
            return str(quantization.get("bnb_4bit_quant_type", "fp4"))
        # GPTQ and AWQ give the bits; torchao writes a whole config with its data types.
        four = quantization.get("bits") == 4 or "'int4'" in str(quantization.get("quant_type"))
        return "int4" if four else "int8"
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += tensor.count
    floats = Counter({_FLOATS[kind]: count for kind, count in counts.items() if kind in _FLOATS})
    return floats.most_common(1)[0][0] if floats else "float32"


def load_graph(file: Path, outside: bool = False) -> ModelProto:
    """Loads an ONNX graph, and its external data only if `outside` is true.

    Raises:
        HfcompressError: if the file is not an ONNX graph, or if onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise HfcompressError("onnx is not installed", "pip install 'hfcompress[onnx]'") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(file), load_external_data=outside)
    except (DecodeError, ValueError, OSError) as error:
        raise HfcompressError(f"{file} is not a complete ONNX graph: {error}", "fetch or export it again") from None
    if not model.graph.node or not model.graph.output:
        raise HfcompressError(f"{file} is not an ONNX graph: it computes nothing", "fetch or export it again")
    return model


def external_files(path: Path, graph: str, required: bool = True) -> list[str]:
    """Lists the files with the external tensors of an ONNX graph, relative to the directory.

    Args:
        path: The directory.
        graph: The graph's file, relative to it.
        required: True to refuse files that are missing or too short.

    Raises:
        HfcompressError: for a file outside the graph's own folder, or if `required`, for a missing or short one.
    """
    folder, found = Path(graph).parent, dict[str, None]()
    for tensor in tensors_of(load_graph(path / graph).graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        name = place.get("location", "")
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise HfcompressError(f"{path / graph} keeps tensors in {name!r}, outside its folder: it is not read")
        file = (folder / name).as_posix()
        found[file] = None
        if required:
            _require_part(path, graph, file, place)
    return list(found)


def _require_part(path: Path, graph: str, file: str, place: Mapping[str, str]) -> None:
    try:
        end = int(place.get("offset", 0)) + int(place.get("length", 0))
    except ValueError:
        raise HfcompressError(f"{path / graph} does not say where in {file} its tensors are") from None
    if not (path / file).is_file():
        raise HfcompressError(f"{path / graph} keeps its tensors in {file}, which is missing", "fetch it too")
    if (path / file).stat().st_size < end:
        raise HfcompressError(f"{path / file} is shorter than {graph} says: it was cut off", "fetch it again")


def tensors_of(graph: GraphProto) -> Iterator[TensorProto]:
    """Yields the stored tensors of a graph, also those of its constants and inner graphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from tensors_of(inner)


def first_not_finite(file: Path) -> str | None:
    """Finds the first tensor of an ONNX graph with a float that is not finite, by its name; None if all are finite."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in tensors_of(load_graph(file, outside=True).graph):
        values = numpy_helper.to_array(tensor)
        # An attention mask may be minus infinity; it is a single number, or has one axis.
        if values.dtype.kind == "f" and values.ndim > 1 and not np.isfinite(values).all():
            return str(tensor.name)
    return None


def onnx_dtype(file: Path) -> str:
    """Finds the stored type of the linear layers' weights, or of the embedding tables if those weights are floats."""
    model = load_graph(file)
    import onnx

    kinds, graph = onnx.TensorProto, model.graph
    # Scales and zero points have one axis at most.
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1}
    words = {node.input[0] for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized") and node.input}
    if any(x.op_type == "MatMulNBits" and onnx.helper.get_node_attr_value(x, "bits") == 4 for x in graph.node):
        return "int4"
    for names in (stored.keys() - words, words & stored.keys()):
        found = {stored[name] for name in names}
        if found & {kinds.INT4, kinds.UINT4}:
            return "int4"
        if found & {kinds.INT8, kinds.UINT8}:
            return "int8"
    return "float16" if kinds.FLOAT16 in stored.values() else "float32"


def openvino_dtype(file: Path) -> str:
    """Finds the type with the fewest bits among tensors of more than one value.

    Raises:
        HfcompressError: if the file is not a graph.
    """
    from xml.etree import ElementTree

    try:
        kinds = {
            data.get("element_type")
            for data in ElementTree.parse(file).getroot().iterfind("layers/layer[@type='Const']/data")
            if int(data.get("size", 0)) > 8
        }
    except (ElementTree.ParseError, ValueError) as error:
        raise HfcompressError(f"{file} is not an OpenVINO graph: {error}", "fetch or export it again") from None
    stored = (("int4", {"i4", "u4", "nf4"}), ("int8", {"i8", "u8"}), ("float16", {"f16"}), ("bfloat16", {"bf16"}))
    return next((dtype for dtype, names in stored if kinds & names), "float32")
