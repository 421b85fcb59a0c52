"""Where the bytes of a model lie: in its embeddings, its encoder or its head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.models.architectures import ARCHITECTURES, PRUNED, ModulePaths
from hfcompress.models.artifact import Artifact, read_config
from hfcompress.models.weights import load_graph, read_header

if TYPE_CHECKING:
    from onnx import TensorProto

GATHERS = ("Gather", "GatherBlockQuantized")
PARTS = ("embeddings", "encoder", "head", "other")


def sizes(artifact: Artifact) -> dict[str, int] | None:
    """Bytes of the stored tensors of each part of a model, as its weight files hold them.

    Scales and zero points count where their weights do. `encoder` is the transformer layers, `head` what follows them
    (the pooler too), `embeddings` the tables and all else that the base model has beside its layers, and `other`
    belongs to no weight. They add up to the files less what describes the tensors (and, of ONNX, the graph).

    Returns:
        By part; None for an architecture that hfcompress does not know, and of OpenVINO, whose tensors lose their
        names.
    """
    spec = ARCHITECTURES.get(str(read_config(artifact.path).get("model_type", "")).removeprefix(PRUNED))
    if spec is None or artifact.runtime == "openvino":
        return None
    found = dict.fromkeys(PARTS, 0)
    onnx = artifact.runtime == "onnx"
    read = _onnx_tensors if onnx else _safetensors
    # Of a graph's files the first is the graph, which tells what the others hold.
    for file in artifact.weight_files[:1] if onnx else artifact.weight_files:
        for names, count in read(file):
            found[next((part for part in (_part(name, spec.modules) for name in names) if part), "other")] += count
    return found


def _part(name: str, modules: ModulePaths) -> str | None:
    """The part that a tensor, or a node that reads it, belongs to by its name; None where the name does not tell."""
    path = f".{name.replace('/', '.')}."
    if f".{modules.layers}." in path:
        return "encoder"
    if any(f".{module}." in path for parts in modules.task_heads.values() for module in parts):
        return "head"
    return "embeddings" if any(f".{kind}" in path for kind in ("weight", "bias")) or "embed" in path else None


def _safetensors(file: Path) -> Iterator[tuple[list[str], int]]:
    """The name and the bytes of each tensor, by the file's header alone."""
    for name, tensor in read_header(file).items():
        yield [name], tensor.bytes


def _onnx_tensors(file: Path) -> Iterator[tuple[list[str], int]]:
    """What each initializer may be known by, its own name and those of the nodes that read it, and its bytes.

    Of what is gathered the nodes come first: a table that is tied to a head may have the head's name.
    """
    graph = load_graph(file).graph
    gathers: dict[str, list[str]] = defaultdict(list)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            (gathers if node.op_type in GATHERS else readers)[name].append(node.name)
    for tensor in graph.initializer:
        yield [*gathers[tensor.name], tensor.name, *readers[tensor.name]], _stored_bytes(tensor)


def _stored_bytes(tensor: TensorProto) -> int:
    outside = {entry.key: entry.value for entry in tensor.external_data}
    return int(outside["length"]) if "length" in outside else len(tensor.raw_data) or tensor.ByteSize()
