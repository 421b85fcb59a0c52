"""Where a model's bytes lie, read off its files, and how a report tells."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from hfcompress.measure.sizes import sizes
from hfcompress.models.artifact import open_artifact, save_model
from hfcompress.models.dummy_inputs import make_dummy_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.models.weight_axes import part_of
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.report import tables
from tests import factories

HIDDEN, FFN, LAYERS, POSITIONS, TYPES = 64, 128, 2, 40, 2
WORDS = len(factories.WORDS)
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN)
VECTORS = LAYERS * (9 * HIDDEN + FFN)
"""Biases and norms of the layers."""
HEAD = HIDDEN * HIDDEN + 2 * HIDDEN
HEAD_VECTORS = HIDDEN + 2
NORM = 2 * HIDDEN
"""Of the embeddings."""


def total(found: dict[str, int] | None) -> int:
    assert found is not None
    return sum(found.values())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    save_model(factories.model(hidden=HIDDEN, ffn=FFN), factories.tokenizer(), path)
    return path


def quantized(source: Path, target: Path, name: str, **options: Any) -> Any:
    target.mkdir(exist_ok=True)
    job = QuantizationJob(source, target, "AutoModelForSequenceClassification", make_dummy_inputs(source))
    BACKENDS.parse({"use": name, **options}).quantize(job)
    return open_artifact(target)


def test_a_float_model_by_its_arithmetic(source: Path) -> None:
    artifact = open_artifact(source)
    (header,) = struct.unpack("<Q", (source / "model.safetensors").read_bytes()[:8])
    found = sizes(artifact)
    assert found == {
        "embeddings": 4 * ((WORDS + POSITIONS + TYPES) * HIDDEN + NORM),
        "encoder": 4 * (LINEAR + VECTORS),
        "head": 4 * (HEAD + HEAD_VECTORS),
        "other": 0,
    }
    assert total(found) == artifact.disk_bytes - 8 - header


@pytest.mark.parametrize(("family", "head"), factories.headed())
def test_every_weight_counts_where_the_model_says(family: str, head: str, tmp_path: Path) -> None:
    model = factories.model(family, head=head)
    model.save_pretrained(tmp_path)
    expected = {"embeddings": 0, "encoder": 0, "head": 0, "other": 0}
    seen = set()
    # Words that a head shares are the embeddings'.
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: "embed" not in item[0]):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            part = part_of(name, model)
            expected["encoder" if part.startswith("layer") else part] += 4 * tensor.numel()
    assert sizes(open_artifact(tmp_path)) == expected


def test_a_pruned_model(tmp_path: Path) -> None:
    model = cut(factories.model(hidden=HIDDEN, ffn=FFN), [Keep((0,), (1, 2)), Keep((1, 2, 3), tuple(range(50)))])
    save_model(model, factories.tokenizer(), tmp_path)
    found, shape = sizes(open_artifact(tmp_path)), open_artifact(tmp_path).shape
    assert found is not None
    assert shape is not None
    assert (found["embeddings"], found["encoder"]) == (4 * shape.embedding_parameters, 4 * shape.encoder_parameters)


def test_scales_count_with_the_weights_of_bitsandbytes(source: Path, tmp_path: Path) -> None:
    artifact = quantized(source, tmp_path, "bnb_8bit")
    found = sizes(artifact)
    assert found is not None
    assert found["encoder"] >= LINEAR + 4 * VECTORS + 4 * LAYERS * (5 * HIDDEN + FFN)  # a scale a row
    assert found["encoder"] <= 1.1 * (LINEAR + 4 * VECTORS + 4 * LAYERS * (5 * HIDDEN + FFN))
    assert found["head"] == 4 * (HEAD + HEAD_VECTORS)
    assert found["other"] == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_an_int4_graph_by_its_arithmetic(bits: int, source: Path, tmp_path: Path) -> None:
    artifact = quantized(source, tmp_path, "onnx_int4", block_size=32, embedding_bits=bits)
    found = sizes(artifact)
    assert found is not None
    rest = (POSITIONS + TYPES) * (HIDDEN + 4)
    words = WORDS * HIDDEN * 5 // 8 if bits == 4 else WORDS * (HIDDEN + 4)
    assert found["embeddings"] == words + rest + 4 * NORM
    widths = LAYERS * 3 * 8  # three numbers say how queries, keys and values part
    assert 0 <= found["encoder"] - (LINEAR * 5 // 8 + 4 * VECTORS) <= widths + LAYERS * 64
    assert found["head"] == HEAD * 5 // 8 + 4 * HEAD_VECTORS
    assert found["other"] < 100
    # What is left of the file is the graph, which is the same for a model of any width.
    assert 0 < artifact.disk_bytes - total(found) < 60_000


@pytest.mark.parametrize("options", [{}, {"embeddings": False}])
def test_an_int8_graph(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    found = sizes(quantized(source, tmp_path, "onnx_int8", **options))
    assert found is not None
    tables = (WORDS + POSITIONS + TYPES) * (HIDDEN * 4 if options else HIDDEN + 4)
    assert found["embeddings"] == tables + 4 * NORM
    # A scale and a zero point a channel come to the weights.
    assert found["encoder"] == pytest.approx(LINEAR + 4 * VECTORS + 5 * LAYERS * (5 * HIDDEN + FFN), rel=0.05)
    assert found["head"] == pytest.approx(HEAD + 4 * HEAD_VECTORS + 5 * (HIDDEN + 2), rel=0.05)
    assert found["other"] < 200


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])  # the exporter names the words of the second by its head
def test_a_mask_head_s_own_copy_of_the_words_is_the_head_s(family: str, tmp_path: Path) -> None:
    save_model(factories.model(family, hidden=HIDDEN, head="mask"), factories.tokenizer(), tmp_path / "float")
    job = QuantizationJob(
        tmp_path / "float", tmp_path / "out", "AutoModelForMaskedLM", make_dummy_inputs(tmp_path / "float")
    )
    job.target.mkdir()
    BACKENDS.parse({"use": "onnx_int4", "embedding_bits": 8}).quantize(job)
    artifact = open_artifact(job.target)
    found, shape = sizes(artifact), artifact.shape
    assert found is not None
    assert shape is not None
    assert found["embeddings"] == (WORDS + POSITIONS + shape.types) * (HIDDEN + 4) + 4 * NORM
    assert found["head"] >= (WORDS + HIDDEN) * HIDDEN * 5 // 8


def test_an_unknown_architecture_has_no_parts(source: Path, tmp_path: Path) -> None:
    from transformers import MegatronBertConfig, MegatronBertForSequenceClassification

    config = MegatronBertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    MegatronBertForSequenceClassification(config).save_pretrained(tmp_path)
    assert sizes(open_artifact(tmp_path)) is None


# The report


def content(*embeddings: Any) -> dict[str, Any]:
    rows = [
        factories.report_row(stage, **({} if value == "absent" else {"embedding_bytes": value}))
        for stage, value in zip(("source", "01-distill"), embeddings, strict=True)
    ]
    return {"rows": rows}


def test_the_table_has_a_column_where_any_model_tells() -> None:
    for known in (content(1_500_000, 250_000), content(1_500_000, None)):
        place = tables.list_headings(known).index("embeddings MB")
        assert tables.list_headings(known)[place - 1] == "MB"
        column = [row[place] for row in tables.format_cells(known)]
        assert column == ["1.5", "0.25" if known["rows"][1]["embedding_bytes"] else "-"]
        assert {len(row) for row in tables.format_cells(known)} == {len(tables.list_headings(known))}
    for unknown in (content(None, None), content("absent", "absent")):
        assert "embeddings MB" not in tables.list_headings(unknown)
        assert {len(row) for row in tables.format_cells(unknown)} == {len(tables.list_headings(unknown))}


def test_the_csv_has_the_bytes() -> None:
    header, *lines = tables.render_csv(content(1_500_000, None)).splitlines()
    place = header.split(",").index("embedding_bytes")
    assert [line.split(",")[place] for line in lines] == ["1500000", ""]
