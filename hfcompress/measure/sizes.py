"""Counts the bytes of a model's parts: its embeddings, its encoder and its task head."""

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
    """Counts the bytes of the stored tensors of each part of a model, as the weight files hold them.

    Scales and zero points count with their weights. `encoder` is the transformer layers, `head` all that follows them
    (the pooler too), `embeddings` the tables and all else that the base model has beside its layers, and `other` is
    tensors that belong to no weight. The sum is the size of the files without their headers (for ONNX
    without the graph).

    Returns:
        The bytes by part; None for an architecture that hfcompress does not know, and for OpenVINO, whose tensors lose
        their names.
    """
    spec = ARCHITECTURES.get(str(read_config(artifact.path).get("model_type", "")).removeprefix(PRUNED))
    if spec is None or artifact.runtime == "openvino":
        return None
    found = dict.fromkeys(PARTS, 0)
    onnx = artifact.runtime == "onnx"
    read = _onnx_tensors if onnx else _safetensors
    # The first file of an ONNX model is the graph, which lists the tensors of the other files.
    for file in artifact.weight_files[:1] if onnx else artifact.weight_files:
        for names, count in read(file):
            found[next((part for part in (_part(name, spec.modules) for name in names) if part), "other")] += count
    return found


def _part(name: str, modules: ModulePaths) -> str | None:
    """Finds the part of a tensor by its name, or by the name of a node that reads it; None if the name does not say."""
    path = f".{name.replace('/', '.')}."
    if f".{modules.layers}." in path:
        return "encoder"
    if any(f".{module}." in path for parts in modules.task_heads.values() for module in parts):
        return "head"
    return "embeddings" if any(f".{kind}" in path for kind in ("weight", "bias")) or "embed" in path else None


def _safetensors(file: Path) -> Iterator[tuple[list[str], int]]:
    """Yields the name and the bytes of each tensor; reads only the file's header."""
    for name, tensor in read_header(file).items():
        yield [name], tensor.bytes


def _onnx_tensors(file: Path) -> Iterator[tuple[list[str], int]]:
    """Yields the possible names of each initializer (its own, and those of the nodes that read it) and its bytes.

    The names of `Gather` nodes come first: a table that is tied to a task head may have the task head's name.
    """
    graph = load_graph(file).graph
    gathers: dict[str, list[str]] = defaultdict(list)
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            (gathers if node.op_type in GATHERS else readers)[name].append(node.name)
    for tensor in graph.initializer:
        yield [*gathers[tensor.name], tensor.name, *readers[tensor.name]], _count_bytes(tensor)


def _count_bytes(tensor: TensorProto) -> int:
    outside = {entry.key: entry.value for entry in tensor.external_data}
    return int(outside["length"]) if "length" in outside else len(tensor.raw_data) or tensor.ByteSize()
