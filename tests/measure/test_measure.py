"""Figures against the raw numbers behind them, and the processes that they come from."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hfcompress import cli
from hfcompress.measure import measure as m
from hfcompress.measure.machine import Turn
from hfcompress.measure.process import ModelProcess, WorkerError
from hfcompress.measure.quality import judge_rows
from hfcompress.measure.rows import Rows
from hfcompress.measure.timing import time_models
from hfcompress.measure.verify import ReloadError, verify
from hfcompress.measure.worker import reduce_logits
from hfcompress.models.artifact import Artifact, label_ids, load_tokenizer, open_artifact, read_config
from hfcompress.recipe.loader import load
from hfcompress.utils.errors import HfcompressError, disk_problem
from tests import factories

AUTO = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An ONNX classifier that answers (number of real tokens, first token id): quick to load, easy to predict."""
    import onnx

    path = tmp_path_factory.mktemp("graph")
    made = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        tiny (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, 2] logits)
        <int64[1] zero = {0}, int64[1] one = {1}> {
            count = ReduceSum <keepdims = 1> (attention_mask, one)
            first = Slice (input_ids, zero, one, one)
            both = Concat <axis = 1> (count, first)
            logits = Cast <to = 1> (both)
        }
    """)
    onnx.save(made, path / "model.onnx")
    factories.model(layers=1).config.save_pretrained(path)
    factories.tokenizer().save_pretrained(path)
    return open_artifact(path, "graph")


BATCHES = [
    {"input_ids": np.array([[7, 3, 0], [5, 1, 2]]), "attention_mask": np.array([[1, 1, 0], [1, 1, 1]])},
    {"input_ids": np.array([[9, 4]]), "attention_mask": np.array([[1, 1]])},
]


def test_a_process_answers_times_and_weighs(graph: Artifact) -> None:
    with ModelProcess(graph, AUTO, threads=1) as process:
        assert process.logits(BATCHES).tolist() == [[2, 7], [3, 5], [2, 9]]
        process.prepare(BATCHES)
        turn = process.time()
        assert len(turn.seconds) == 2
        assert min(turn.seconds) > 0
        assert turn.wall >= sum(turn.seconds)
        assert min(turn.cpu, turn.involuntary, turn.waited or 0.0) >= 0
        assert len(process.time(most=1).seconds) == 1
        assert process.peak_memory()[0] > 10e6  # an interpreter alone takes more


def test_a_graph_is_never_put_on_a_gpu(graph: Artifact) -> None:
    with ModelProcess(graph, AUTO, device="cuda", threads=1) as process:
        assert process.device == "cpu"


def test_what_the_process_could_not_do_is_told(graph: Artifact, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    (tmp_path / "config.json").write_text("{}")
    broken = Artifact(tmp_path, "source", "model", None, "onnx", "float32")
    with pytest.raises(WorkerError, match=r"in a fresh process: InvalidProtobuf: .*model\.onnx failed"):
        ModelProcess(broken, AUTO, threads=1)
    with ModelProcess(graph, AUTO, threads=1) as process:
        with pytest.raises(WorkerError, match="in a fresh process: InvalidArgument"):
            process.logits([{"input_ids": np.zeros((1, 2, 2), "int64"), "attention_mask": np.ones((1, 2), "int64")}])
        assert process.logits(BATCHES[1:]).tolist() == [[2, 9]]  # and it goes on


def test_a_process_that_died_is_told(graph: Artifact) -> None:
    with ModelProcess(graph, AUTO, threads=1) as process:
        process._process.kill()
        process._process.wait()
        with pytest.raises(WorkerError, match=r"the process for .* died"):
            process.time()


@pytest.mark.parametrize("said", ["OSError: [Errno 28] No space left on device", "OSError: 96 requested and 0 written"])
def test_a_process_that_has_no_room_for_its_answers(graph: Artifact, said: str) -> None:
    with ModelProcess(graph, AUTO) as process:
        process._process.stdout.close()  # type: ignore[union-attr]
        process._process.stdout = io.StringIO(json.dumps({"ok": False, "error": said, "fix": ""}) + "\n")
        with pytest.raises(OSError, match="No space left") as error:
            process.peak_memory()
    assert (disk_problem(error.value) or "").startswith("the disk is full: ")


def test_a_saved_model_must_be_the_one_in_memory(graph: Artifact) -> None:
    from hfcompress.models.dummy_inputs import make_dummy_inputs

    probe = make_dummy_inputs(graph.path)
    expected = np.stack([probe["attention_mask"].sum(1), probe["input_ids"][:, 0]], 1).astype("float32")
    assert verify(graph, expected, AUTO) == {"onnx": 0}
    with pytest.raises(ReloadError, match="differs from the model in memory by"):
        verify(graph, expected * 1.01, AUTO)


# What is kept of the logits


def test_a_sequence_head_s_logits_stay_as_they_are() -> None:
    logits = np.arange(6.0).reshape(2, 3)
    assert reduce_logits(logits, {"attention_mask": np.ones((2, 4))}, "sequence") is logits


@pytest.mark.parametrize("head", ["token", "span"])
def test_of_a_token_head_the_real_tokens_stay_row_after_row(head: str) -> None:
    logits = np.arange(12.0).reshape(2, 3, 2)
    batch = {"attention_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    assert reduce_logits(logits, batch, head).tolist() == [[0, 1], [2, 3], [6, 7], [8, 9], [10, 11]]


def test_of_a_mask_head_counts_and_likelihoods_stay() -> None:
    probabilities = np.array([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]])
    logits = (np.log(probabilities) + 1000).astype(np.float32)  # a shift changes nothing, and must not overflow
    labels = np.array([[0, 2], [-100, -100]])
    found = reduce_logits(logits, {"labels": labels, "attention_mask": np.ones((2, 2))}, "mask")
    assert found[:, :2].tolist() == [[2, 1], [0, 0]]
    assert found[:, 2] == pytest.approx([-np.log(0.7) - np.log(0.3), 0], abs=1e-3)


def test_compression_is_a_ratio_to_the_source_and_the_speedup_is_the_first_batch_sizes() -> None:
    row = {"latency": [{"speedup": 4.5}, {"speedup": 2.5}], "disk_bytes": 250}
    found = m._compare(row, {"disk_bytes": 1000})
    assert found == {**row, "speedup": 4.5, "compression": 4.0}


@pytest.fixture
def task(recipe: Path) -> Any:
    return load(recipe).recipe.task


def read(task: Any, model: Path) -> Any:
    """The test rows as a model reads them."""
    return Rows(task, load_tokenizer(model), task.read("test"), label_ids(read_config(model)))


def test_quality_is_the_metric_of_all_rows_with_its_interval(task: Any, teacher: Path) -> None:
    artifact = open_artifact(teacher)
    rows = read(task, teacher)
    order = np.argsort(np.asarray(rows.encoded["length"]), kind="stable")
    wrong = {3, 10, 11}  # rows, in the order that they are asked in

    def logits(batches: Any) -> Any:
        assert sum(len(batch["input_ids"]) for batch in batches) == 48
        right = np.asarray(rows.encoded["labels"])[order]
        answers = np.array([1 - label if i in wrong else label for i, label in enumerate(right)])
        return np.eye(2)[answers]

    process: Any = SimpleNamespace(artifact=artifact, logits=logits)
    quality, (low, high) = m._score_answers(judge_rows(process, rows), task, 400, 0)
    assert quality == {"accuracy": 45 / 48, "n": 48}
    # The normal approximation of the interval: p ± 1.96 sqrt(p (1 - p) / n).
    half = 1.96 * (45 / 48 * 3 / 48 / 48) ** 0.5
    assert low == pytest.approx(45 / 48 - half, abs=0.03)
    assert high == pytest.approx(45 / 48 + half, abs=0.03)


def test_answers_that_are_not_finite_are_refused(task: Any, teacher: Path) -> None:
    process: Any = SimpleNamespace(artifact=open_artifact(teacher), logits=lambda _: np.full((48, 2), np.nan))
    with pytest.raises(HfcompressError, match="values that are not finite"):
        judge_rows(process, read(task, teacher))


def test_batches_are_arrays_in_the_order_of_the_groups(task: Any, teacher: Path) -> None:
    rows = read(task, teacher)
    ids = rows.encoded["input_ids"][:]
    first, second = rows.batches([[3, 0], [7]], ("input_ids", "attention_mask", "labels"))
    longest = max(len(ids[3]), len(ids[0]))
    assert first["input_ids"].tolist() == [row + [0] * (longest - len(row)) for row in (ids[3], ids[0])]
    assert first["attention_mask"].sum(1).tolist() == [len(ids[3]), len(ids[0])]
    assert second["input_ids"].tolist() == [ids[7]]
    assert [*first["labels"], *second["labels"]] == [rows.encoded["labels"][i] for i in (3, 0, 7)]


def test_every_model_is_timed_on_the_same_rows(task: Any, teacher: Path) -> None:
    data = read(task, teacher)
    seen: list[list[Any]] = [[], []]

    def fake(index: int) -> Any:
        return SimpleNamespace(
            artifact=open_artifact(teacher), device="cpu", threads=1, chooses_threads=True, pid=os.getpid(),
            prepare=seen[index].append, time=lambda threads, most=None: Turn([0.01], threads, 0.01, 0.01, 0.0, 0),
        )  # fmt: skip

    options = m.Latency(batch_sizes=[1, 8], rows=8)
    found, _ = time_models([fake(0), fake(1)], [data, data], options, 0, lambda _: None)
    assert [[batch["input_ids"].tolist() for batch in batches] for batches in seen[0]] == [
        [batch["input_ids"].tolist() for batch in batches] for batches in seen[1]
    ]
    assert [[len(batch["input_ids"]) for batch in batches] for batches in seen[0]] == [[1] * 8, [8]]
    assert [[entry["batch_size"] for entry in row] for row in found] == [[1, 8], [1, 8]]


# Any models side by side


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """An architecture that hfcompress cannot take apart, with word ids of its own."""
    import torch
    import transformers as t

    path = tmp_path_factory.mktemp("megatron")
    specials, words = factories.WORDS[:5], factories.WORDS[5:]
    tokenizer = factories.tokenizer(words=[*specials, *reversed(words)])
    torch.manual_seed(0)
    config = t.MegatronBertConfig(
        vocab_size=len(factories.WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    model = t.MegatronBertForSequenceClassification(config)
    factories.teach(model, tokenizer, data)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, megatron: Path, data: Path
) -> tuple[str, dict[str, Any]]:
    """What `hfcompress evaluate` printed and wrote of a teacher and a stock model with another tokenizer."""
    folder = tmp_path_factory.mktemp("compare")
    recipe = factories.recipe(folder / "r.yaml", teacher, data)
    arguments = ["evaluate", str(teacher), str(megatron), "--task", str(recipe), "-o", str(folder / "out")]
    with factories.machine_state():
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output, json.loads((folder / "out" / "report.json").read_text())


def test_each_model_reads_the_rows_with_its_own_tokenizer(compared: tuple[str, dict[str, Any]]) -> None:
    _, report = compared
    assert [row["quality"] for row in report["rows"]] == [{"accuracy": 1.0, "n": 48}] * 2
    assert report["task"]["split"] == "test"


def test_a_stock_architecture_is_measured_though_it_cannot_be_cut(
    compared: tuple[str, dict[str, Any]], megatron: Path
) -> None:
    from safetensors.torch import load_file

    _, report = compared
    row = report["rows"][1]
    assert row["parameters"] == sum(t.numel() for t in load_file(megatron / "model.safetensors").values())
    assert (row["encoder_parameters"], row["macs"], row["energy_wh_per_1k"]) == (None, None, None)
    assert row["disk_bytes"] == (megatron / "model.safetensors").stat().st_size
    assert row["peak_memory_bytes"] > 50e6


def test_the_figures_of_a_comparison_hang_together(compared: tuple[str, dict[str, Any]]) -> None:
    output, report = compared
    source, other = report["rows"]
    assert (source["speedup"], source["compression"]) == (1.0, 1.0)
    assert other["speedup"] == round(source["latency"][0]["p50_ms"] / other["latency"][0]["p50_ms"], 4)
    assert other["compression"] == round(source["disk_bytes"] / other["disk_bytes"], 4)
    assert report["machine"]["busy"] is False
    for row in report["rows"]:
        for entry in row["latency"]:
            low, high = entry["speedup_interval"]
            assert low <= entry["speedup"] <= high
            assert entry["rounds"] >= 6
            mean_seconds = entry["batch_size"] / entry["samples_per_s"]
            assert 0 < mean_seconds < 5
            assert 0 < entry["p50_ms"] <= entry["p95_ms"]
    assert f"{other['compression']:.2f}x" in output
    assert "report " in output
