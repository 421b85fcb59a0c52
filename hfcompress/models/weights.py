"""Finds the weight files of a model directory and reads their headers; no weights are loaded."""

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
"""Where a quantized model keeps the adapters that were trained on it, as peft saves them."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES, OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl"), (".h5", ".msgpack")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
"""Names of pickled weights in transformers; `convert --allow-pickle` reads them."""
_FOLDERS = ("onnx", "openvino")
"""Folders of a model directory, or of a repository on the Hub, that graphs lie in."""
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
           "F8_E5M2": "float8_e5m2"}  # fmt: skip
INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class Choice:
    """The file that a model is loaded from, of all that lie in its directory.

    Attributes:
        runtime: What runs it.
        file: Its name, relative to the directory.
        others: Graphs that could have been meant too.
    """

    runtime: Runtime
    file: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, as the header of its file describes it.

    Attributes:
        dtype: As safetensors calls it, such as `BF16`.
        shape: Its axes.
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
    """The files of a model directory that weights can be among, relative to it."""
    folders = [path, *(path / name for name in _FOLDERS if (path / name).is_dir())]
    return sorted(
        file.relative_to(path).as_posix() for folder in folders for file in folder.iterdir() if file.is_file()
    )


def choose(names: Collection[str], where: str, graph: str = "") -> Choice:
    """The file that a model is loaded from, by the names of its files.

    A graph that is named; else `model.safetensors`, or the shards of its index; else `model.onnx`, or the only ONNX
    graph; else `openvino_model.xml`, or the only OpenVINO one. A graph is looked for in the directory, then in its
    `onnx/` or `openvino/`.

    Args:
        names: The files, relative to the directory.
        where: The directory or Hub id, for messages.
        graph: The file that is named.

    Raises:
        HfcompressError: if nothing can be loaded, or if it is not clear which file is meant.
    """
    graphs = {"onnx": [n for n in names if n.endswith(".onnx")], "openvino": _xml_files(names)}
    if graph:
        return _choose_named(graph, graphs, where)
    if ADAPTER_CONFIG in names:
        raise HfcompressError(
            f"{where} is a peft adapter, or holds one beside its weights, and what loads would be another model",
            "merge it into its base (merge_and_unload(), save_pretrained), or name it as a `teacher` or as a student's "
            "`from`, where it is merged; delete adapter_config.json where it belongs to nothing",
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
            f"name the one that is meant: {where}:{found[0]}",
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
            f"{where} holds {', '.join(stray)}, and neither {WHOLE} nor {INDEX}: what would load is not said",
            f"rename the file that holds the whole model to {WHOLE}; put the index beside its shards",
        )
    return HfcompressError(
        f"{where} holds no weights", "a model.safetensors (or model.onnx) belongs beside config.json"
    )


def openvino_files(names: Iterable[str]) -> list[str]:
    """OpenVINO's files among the names: `.xml` graphs and, each beside its own, the raw tensors in a `.bin`."""
    return [graph.removesuffix(".xml") + end for graph in _xml_files(names) for end in (".bin", ".xml")]


def _xml_files(names: Iterable[str]) -> list[str]:
    known = set(names)
    return sorted(n for n in known if n.endswith(".xml") and f"{n.removesuffix('.xml')}.bin" in known)


def weight_files(path: Path, graph: str = "") -> list[str]:
    """The files of a model directory that hold the weights of the model that loads, relative to it.

    The shards that an index names, and a graph's external data, are among them; other formats, variants, adapters of
    other models and leftovers are not.

    Args:
        path: The directory.
        graph: A graph that is named.

    Raises:
        HfcompressError: if nothing can be loaded, or if a part of it is missing.
    """
    if (path / ADAPTER_CONFIG).is_file() and (path / ADAPTER_WEIGHTS).is_file() and not (path / WHOLE).is_file():
        return [ADAPTER_WEIGHTS]
    return files_of(path, choose(names_in(path), str(path), graph))


def files_of(path: Path, choice: Choice) -> list[str]:
    """`weight_files` of what was chosen."""
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
    """The shards that the index of a model names."""
    index = path / INDEX
    if index.stat().st_size > INDEX_BYTES:
        raise HfcompressError(f"{index} has {index.stat().st_size:,} bytes, which no index has")
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


# What headers tell


def read_header(file: Path) -> dict[str, Tensor]:
    """Reads the header of a safetensors file: its tensors by name. No tensor is loaded.

    Raises:
        HfcompressError: for a file that is cut off or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np") as stored:  # it refuses a header that does not fit the file
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
            return {name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise HfcompressError(
            f"{file} is no whole safetensors file: {error}", "fetch or save it again: it was cut off or altered"
        ) from None


def read_headers(path: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of the safetensors among the files, adapters left out."""
    found: dict[str, Tensor] = {}
    for name in files:
        if name.endswith(".safetensors") and "/" not in name:
            found |= read_header(path / name)
    return found


def torch_dtype(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The stored type of a PyTorch model: the one of its quantization, else the float type of most weights."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization:
        if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
            return str(quantization.get("bnb_4bit_quant_type", "fp4"))
        # GPTQ and AWQ say the bits; torchao spells out a config, data types and all.
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
        HfcompressError: if the file is no ONNX graph, or onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise HfcompressError("onnx is not installed", "pip install 'hfcompress[onnx]'") from None
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(file), load_external_data=outside)
    except (DecodeError, ValueError, OSError) as error:
        raise HfcompressError(f"{file} is no whole ONNX graph: {error}", "fetch or export it again") from None
    if not model.graph.node or not model.graph.output:
        raise HfcompressError(f"{file} is no ONNX graph: it computes nothing", "fetch or export it again")
    return model


def external_files(path: Path, graph: str, required: bool = True) -> list[str]:
    """The files that an ONNX graph keeps tensors in, relative to the directory.

    Args:
        path: The directory.
        graph: The graph's file, relative to it.
        required: Refuse a file that is missing or too short.

    Raises:
        HfcompressError: for a place that is outside the graph's own folder, or as `required` says.
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
    """The stored tensors of a graph, those of its constants and inner graphs too."""
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
        # A mask of attention may be minus infinity: that is one number, or of one axis.
        if values.dtype.kind == "f" and values.ndim > 1 and not np.isfinite(values).all():
            return str(tensor.name)
    return None


def onnx_dtype(file: Path) -> str:
    """The stored type of the linear layers' weights; of the embedding tables if those are floats."""
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
    """The fewest bits that a tensor of more than one value is stored in.

    Raises:
        HfcompressError: if the file is no graph.
    """
    from xml.etree import ElementTree

    try:
        kinds = {
            data.get("element_type")
            for data in ElementTree.parse(file).getroot().iterfind("layers/layer[@type='Const']/data")
            if int(data.get("size", 0)) > 8
        }
    except (ElementTree.ParseError, ValueError) as error:
        raise HfcompressError(f"{file} is no OpenVINO graph: {error}", "fetch or export it again") from None
    stored = (("int4", {"i4", "u4", "nf4"}), ("int8", {"i8", "u8"}), ("float16", {"f16"}), ("bfloat16", {"bf16"}))
    return next((dtype for dtype, names in stored if kinds & names), "float32")
