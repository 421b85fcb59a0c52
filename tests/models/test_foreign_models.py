"""Model directories that others wrote: each is loaded as what it is, or refused with what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from hfcompress.data.source import model_directory, open_model, split_graph, stored_dtype
from hfcompress.measure.process import ModelProcess, WorkerError
from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import load_finite_model, load_model, load_tokenizer, open_artifact, weights_hash
from hfcompress.models.weights import weight_files
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.factories import copy_directory, run_cli
from tests.in_process import InThisProcess

AUTO = "AutoModelForSequenceClassification"


def with_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def with_config(path: Path, **changes: Any) -> Path:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return path


@pytest.fixture
def model(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be spoilt."""
    return copy_directory(teacher, tmp_path / "model")


@pytest.fixture
def said(recipe: Path, capsys: pytest.CaptureFixture[str], in_process: None) -> Any:
    """What a command says of a model that it refuses; it ends with 2 and without a traceback."""

    def run(command: str, path: Path | str) -> str:
        arguments = {"evaluate": [path, "--task", recipe], "doctor": [path]}
        assert run_cli(command, *arguments.get(command, [recipe, "--set", f"model={path}"])) == 2
        told = capsys.readouterr().err
        assert "error: " in told
        assert "Traceback" not in told
        return told

    return run


# --- weights that no checkpoint brought


def base_model(path: Path) -> Path:
    built = factories.model()
    return factories.save(built.bert, path)


def spoil(path: Path, how: str) -> None:
    tensors = load_file(path / "model.safetensors")
    weight = "bert.encoder.layer.1.output.dense.weight"
    if how == "misnamed":
        tensors[weight.replace("output", "out")] = tensors.pop(weight)
    elif how == "lost":
        del tensors[weight]
    elif how == "narrow":
        tensors[weight] = tensors[weight][:, :-1].contiguous()
    elif how == "another layer":
        tensors |= {n.replace("layer.1", "layer.2"): t.clone() for n, t in tensors.items() if "layer.1." in n}
    elif how == "another module":
        tensors["extra.dense.weight"] = torch.ones(2, 2)
    elif how == "whole numbers":
        tensors[weight] = tensors[weight].to(torch.int8)
    with_tensors(path, tensors)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("misnamed", r"lacks 1 of the weights .*\(bert.encoder.layer.1.output.dense.weight\): they would be random"),
        ("lost", r"lacks 1 of the weights"),
        ("narrow", r"1 weights of other sizes than its config.json says \(bert.encoder.layer.1.output.dense.weight\)"),
        ("another layer", r"no place for \(bert.encoder.layer.2.attention"),
        ("another module", r"no place for \(extra.dense.weight\)"),
        ("whole numbers", r"stores bert.encoder.layer.1.output.dense.weight in integers \(I8\)"),
    ],
)
def test_weights_that_do_not_belong_to_the_model_are_refused(model: Path, how: str, why: str) -> None:
    spoil(model, how)
    with pytest.raises(HfcompressError, match=why):
        load_model(model, AUTO)
    if how not in ("another module",):  # a head to be trained does not change what the body must have
        with pytest.raises(HfcompressError, match=why):
            load_model(model, AUTO, fresh_head=True)


@pytest.fixture(scope="module")
def worker(teacher: Path) -> Iterator[ModelProcess]:
    """What loads one model after the other."""
    with InThisProcess(open_artifact(teacher), AUTO, threads=1) as process:
        yield process


def judged(process: ModelProcess, path: Path, auto_class: str = AUTO) -> str:
    """What the process, and by the same rule this one, has against a model; empty where nothing."""
    process.auto_class, found = auto_class, list[str]()
    for load in (lambda: process.load(open_artifact(path), False, None), lambda: load_finite_model(path, auto_class)):
        try:
            load()
            found.append("")
        except HfcompressError as error:
            found.append(str(error))
    assert found[0] == found[1]
    return found[0]


def test_a_base_model_has_no_head_to_measure(tmp_path: Path, worker: ModelProcess) -> None:
    path = base_model(tmp_path / "base")
    assert "lacks 2 of the weights" in judged(worker, path)
    assert load_model(path, AUTO, fresh_head=True).num_labels == 2


@pytest.mark.parametrize("how", ["misnamed", "narrow", "another layer", "another module"])
def test_a_worker_is_judged_by_the_same_rule(model: Path, how: str, worker: ModelProcess) -> None:
    spoil(model, how)
    assert judged(worker, model)


def test_a_head_of_another_kind_is_refused_though_its_names_fit(model: Path) -> None:
    with pytest.raises(HfcompressError, match="is a model SequenceClassification and not TokenClassification"):
        load_model(model, "AutoModelForTokenClassification")


def test_what_a_model_does_not_read_is_no_fault(model: Path, tmp_path: Path, worker: ModelProcess) -> None:
    tensors = load_file(model / "model.safetensors")
    spare = {
        "bert.embeddings.position_ids": torch.arange(40)[None],
        "cls.predictions.bias": torch.ones(len(factories.WORDS)),
        "cls.seq_relationship.weight": torch.ones(2, 32),
    }
    with_tensors(model, tensors | spare)
    assert not judged(worker, model)
    tagger = factories.save(factories.model(head="token"), tmp_path / "tagger")
    pooler = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    with_tensors(tagger, load_file(tagger / "model.safetensors") | pooler)
    assert not judged(worker, tagger, "AutoModelForTokenClassification")


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "electra", "llama"])
def test_words_that_are_tied_are_not_missed(family: str, tmp_path: Path) -> None:
    head = "causal" if family == "llama" else "mask"
    path = factories.save(factories.model(family, head=head, tie_word_embeddings=True), tmp_path / "tied")
    load_model(path, "AutoModel" + TASK_HEADS[head])


def test_values_that_are_not_numbers_are_told_by_name(model: Path, worker: ModelProcess) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.bias"][3] = torch.inf
    with_tensors(model, tensors)
    told = f"{model}: bert.encoder.layer.0.output.dense.bias has values that are NaN or infinite"
    assert judged(worker, model).startswith(told)


# --- which files are the weights


def test_a_pickle_beside_an_unrelated_file_is_not_loaded(model: Path, said: Any) -> None:
    (model / "model.safetensors").rename(model / "vision.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
    assert "pickled weights only (pytorch_model.bin)" in said("evaluate", model)


def test_what_is_weighed_and_hashed_is_what_loads(model: Path) -> None:
    before, size = weights_hash(model), open_artifact(model).disk_bytes
    digest = hashlib.sha256()  # the rule of before: the names and bytes of config and weights, in order
    for name in ("config.json", "model.safetensors"):
        digest.update(name.encode() + (model / name).read_bytes())
    assert before == digest.hexdigest()[:16]
    for name in (
        "other.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
    ):
        (model / name).write_bytes(b"a leftover")
    (model / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    assert weight_files(model) == ["model.safetensors"]
    assert (weights_hash(model), open_artifact(model).disk_bytes) == (before, size)
    load_model(model, AUTO)


def sharded(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_torch_state_dict(tensors, model, max_shard_size="60KB")
    return model


def test_shards_are_those_of_the_index(model: Path) -> None:
    whole = {name: t.clone() for name, t in load_model(model, AUTO).state_dict().items()}
    sharded(model)
    (model / "model-00003-of-00003.safetensors").write_bytes(b"stale")
    assert weight_files(model) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert all(torch.equal(t, whole[name]) for name, t in load_model(model, AUTO).state_dict().items())


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (
            '{"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}',
            "names '../../x.safetensors', which is no safetensors file",
        ),
        ('{"metadata": {}, "weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"metadata": {}, "weight_map": {"a": "model-00009-of-00009.safetensors"}}', "which .* does not hold"),
        ('{"metadata": {}, "weight_map": {}}', "names no file"),
        ('{"metadata": {}, "weight_map": [1]}', "is not the index of a model's shards"),
        ("[" * 100_000, "is not the index of a model's shards"),
        ("\xff", "is not the index of a model's shards"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(model: Path, index: str, why: str) -> None:
    sharded(model)
    (model / "model.safetensors.index.json").write_text(index, encoding="latin-1")
    for open_it in (open_artifact, weights_hash, lambda path: load_model(path, AUTO)):
        with pytest.raises(HfcompressError, match=why):
            open_it(model)


def test_an_adapter_is_not_a_model(model: Path, said: Any) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model", "peft_type": "LORA"}')
    assert "is a peft adapter" in said("evaluate", model)


# --- graphs


def graph(
    path: Path,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    outputs: tuple[str, ...] = ("logits",),
    kind: str = "INT64",
    name: str = "model.onnx",
    axes: tuple[Any, ...] = ("b", "s"),
    per_token: bool = False,
    **config: Any,
) -> Path:
    """An ONNX model whose output numbered `i` is the sum of its inputs, each times ten to its place, plus `i`.

    It is `(batch, 2)`, twice the sum over a text, or with `per_token` `(batch, length)`.
    """
    import onnx
    from onnx import TensorProto, helper

    (path / name).parent.mkdir(parents=True, exist_ok=True)
    made = [helper.make_tensor_value_info(n, getattr(TensorProto, kind), axes) for n in inputs]
    nodes, terms, constants = [], [], [helper.make_tensor("one", TensorProto.INT64, [1], [1])]
    for place, source in enumerate(inputs):
        constants.append(helper.make_tensor(f"ten{place}", TensorProto.FLOAT, [1], [10.0**place]))
        nodes.append(helper.make_node("Cast", [source], [f"f{place}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"f{place}", f"ten{place}"], [f"t{place}"]))
        terms.append(f"t{place}")
    nodes.append(helper.make_node("Sum", terms, ["each"]))
    nodes.append(helper.make_node("ReduceSum", ["each", "one"], ["all"], keepdims=1))
    nodes.append(helper.make_node("Concat", ["all", "all"], ["both"], axis=1))
    for number, output in enumerate(outputs):
        constants.append(helper.make_tensor(f"plus{number}", TensorProto.FLOAT, [1], [float(number)]))
        nodes.append(helper.make_node("Add", ["each" if per_token else "both", f"plus{number}"], [output]))
    shapes = ["b", "s"] if per_token else ["b", 2]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes) for n in outputs]
    whole = helper.make_graph(nodes, "tiny", made, results, constants)
    onnx.save(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path / name)
    content = {"model_type": "bert", "vocab_size": len(factories.WORDS), "hidden_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 40}  # fmt: skip
    (path / "config.json").write_text(json.dumps(content | config))
    factories.tokenizer().save_pretrained(path)
    return path


BATCH = {"input_ids": np.array([[7, 3, 1], [5, 1, 1]]), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
SUMS = [11 + 10 * 2, 7 + 10 * 1]


def answers(path: Path | str, auto_class: str = AUTO, batch: Any = BATCH) -> Any:
    with InThisProcess(open_model(str(path)), auto_class, threads=1) as process:
        return process.logits([batch])


def test_one_graph_of_several_is_named_or_the_usual_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = graph(tmp_path / "two", name="model_quantized.onnx", outputs=("unused", "logits"))
    graph(tmp_path / "two")
    usual = open_model(str(path))
    assert [file.name for file in usual.weight_files] == ["model.onnx"]
    told = capsys.readouterr().err
    assert f"{path} holds 2 graphs, and model.onnx is used" in told
    assert f"{path}:model_quantized.onnx" in told
    named = open_model(f"{path}:model_quantized.onnx")
    assert [file.name for file in named.weight_files] == ["model_quantized.onnx"]
    assert answers(path)[0, 0] == SUMS[0]
    assert answers(f"{path}:model_quantized.onnx")[0, 0] == SUMS[0] + 1
    with pytest.raises(HfcompressError, match=r"holds no graph 'model_int8.onnx'"):
        open_model(f"{path}:model_int8.onnx")
    with pytest.raises(HfcompressError, match="names a graph, which can be measured, but not trained"):
        model_directory(f"{path}:model.onnx")


def test_of_graphs_that_are_no_usual_one_none_is_guessed(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        graph(tmp_path / "two", name=name)
    with pytest.raises(HfcompressError, match=r"several graphs, and none is called model.onnx: a.onnx, b.onnx"):
        open_model(str(tmp_path / "two"))


def test_a_graph_in_the_folder_of_its_format_is_found(tmp_path: Path) -> None:
    path = graph(tmp_path / "sub", name="onnx/model_quantized.onnx")
    assert open_model(str(path)).weight_files == [path / "onnx" / "model_quantized.onnx"]
    assert answers(path)[:, 0].tolist() == SUMS
    first = weights_hash(path)
    graph(path, name="onnx/model_quantized.onnx", outputs=("a", "logits"))
    assert weights_hash(path) != first


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("user/name:onnx/model.onnx", ("user/name", "onnx/model.onnx")),
        ("user/name@main:model.onnx", ("user/name@main", "model.onnx")),
        ("./dir:./model.xml", ("./dir", "model.xml")),
        ("user/name@refs/pr/1", ("user/name@refs/pr/1", "")),
        ("builtin:quickstart", ("builtin:quickstart", "")),
    ],
)
def test_a_graph_is_named_after_a_colon(spec: str, parts: tuple[str, str]) -> None:
    assert split_graph(spec) == parts


def test_inputs_of_older_exporters_are_what_their_names_say(tmp_path: Path) -> None:
    path = graph(tmp_path / "old", inputs=("input_word_ids", "input_mask", "segment_ids"), kind="INT32")
    assert answers(path)[:, 0].tolist() == SUMS  # token types that a tokenizer leaves out are zeros
    typed = BATCH | {"token_type_ids": np.array([[0, 1, 0], [0, 0, 0]])}
    assert answers(path, batch=typed)[:, 0].tolist() == [SUMS[0] + 100, SUMS[1]]


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "bert"}, [0 + 1 + 2, 0 + 1 + 2]),
        ({"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1}, [2 + 3 + 1, 2 + 1 + 1]),
    ],
)
def test_positions_are_made_as_the_family_counts_them(tmp_path: Path, config: Any, positions: list[int]) -> None:
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    path = graph(tmp_path / "g", inputs=("input_ids", "attention_mask", "position_ids"), **config)
    found = (answers(path)[:, 0] - SUMS) / 100
    assert found.tolist() == positions
    if config["model_type"] == "roberta":
        ids = torch.from_numpy(BATCH["input_ids"])
        made = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
        assert found.tolist() == made.sum(1).tolist()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (
            {"inputs": ("input_ids", "attention_mask", "past_key_values.0.key")},
            "has an unknown input 'past_key_values.0.key'",
        ),
        ({"inputs": ("input_ids", "attention_mask", "visual_feats")}, "has an unknown input 'visual_feats'"),
        ({"inputs": ("input_ids",)}, "takes no 'attention_mask', so padding would be read as text"),
        ({"axes": (1, 128)}, "input 'input_ids' is 1 x 128"),
        ({"outputs": ("first", "second")}, "outputs are first, second, and none of them is named logits"),
        ({"outputs": ("last_hidden_state",)}, "outputs are last_hidden_state"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "answers with 2 x 2 numbers, but .* answers with 2 x 3"),
        ({"per_token": True}, "answers with 2 x 3 numbers, but a model ForSequenceClassification"),
    ],
    ids=["cache", "unknown input", "no mask", "fixed axes", "unknown outputs", "hidden", "labels", "axes"],
)
def test_a_graph_that_cannot_be_fed_or_read_is_refused(tmp_path: Path, made: Any, why: str) -> None:
    path = graph(tmp_path / "g", **made)
    with pytest.raises(WorkerError, match=why):
        answers(path)


def test_pairs_need_a_graph_that_tells_them_apart(tmp_path: Path) -> None:
    path = graph(tmp_path / "g", type_vocab_size=2)
    pairs = BATCH | {"token_type_ids": np.array([[0, 1, 0], [0, 0, 0]])}
    with pytest.raises(WorkerError, match="takes no 'token_type_ids'"):
        answers(path, batch=pairs)
    without = graph(tmp_path / "h", model_type="distilbert")
    assert answers(without, batch=pairs)[:, 0].tolist() == SUMS


def test_outputs_are_taken_by_name(tmp_path: Path) -> None:
    sides = graph(tmp_path / "span", outputs=("end_logits", "start_logits"), per_token=True)
    found = answers(sides, "AutoModelForQuestionAnswering")
    assert found.shape == (2, 3, 2)
    assert (found[..., 0] - found[..., 1] == 1).all()  # the second output is the start
    late = graph(tmp_path / "late", outputs=("hidden_states", "logits"))
    assert answers(late)[:, 0].tolist() == [total + 1 for total in SUMS]
    only = graph(tmp_path / "only", outputs=("output_0",))
    assert answers(only)[:, 0].tolist() == SUMS


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "cut off"])
def test_a_broken_graph_is_told(tmp_path: Path, content: bytes | None, said: Any) -> None:
    path = graph(tmp_path / "g")
    whole = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    told = said("evaluate", path)
    assert "model.onnx is no" in told or "in a fresh process" in told


# --- tensors outside a graph


def outside(path: Path) -> Path:
    """A graph whose table of words lies in another file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    path.mkdir()
    table = np.arange(2 * len(factories.WORDS), dtype=np.float32).reshape(-1, 2)
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    nodes = [
        helper.make_node("Gather", ["embeddings.words", "input_ids"], ["words"]),
        helper.make_node("ReduceSum", ["words", "one"], ["logits"], keepdims=0),
    ]
    constants = [numpy_helper.from_array(table, "embeddings.words"), numpy_helper.from_array(np.array([1]), "one")]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 2])
    made = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, [output], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(made, path / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=64)
    (path / "config.json").write_text('{"model_type": "megatron-bert"}')
    return path


def test_tensors_outside_a_graph_are_loaded_weighed_and_hashed(tmp_path: Path) -> None:
    path = outside(tmp_path / "g")
    artifact = open_artifact(path)
    assert [file.name for file in artifact.weight_files] == ["model.onnx", "model.onnx_data"]
    assert artifact.disk_bytes > 8 * len(factories.WORDS)
    first = weights_hash(path)
    assert answers(path)[0].tolist() == [2 * 11, 2 * 11 + 3]
    with (path / "model.onnx_data").open("r+b") as stream:
        stream.write(b"\x00\x00\x80\x3f")
    assert weights_hash(path) != first


def test_tensors_outside_a_graph_must_be_there_and_in_its_folder(tmp_path: Path) -> None:
    import onnx

    path = outside(tmp_path / "g")
    whole = (path / "model.onnx_data").read_bytes()
    (path / "model.onnx_data").write_bytes(whole[:-8])
    with pytest.raises(HfcompressError, match=r"model\.onnx_data is shorter than model\.onnx says"):
        open_artifact(path)
    (path / "model.onnx_data").rename(tmp_path / "model.onnx_data")
    with pytest.raises(HfcompressError, match=r"keeps its tensors in model\.onnx_data, which is missing"):
        open_artifact(path)
    made = onnx.load(path / "model.onnx", load_external_data=False)
    next(e for e in made.graph.initializer[0].external_data if e.key == "location").value = "../model.onnx_data"
    (path / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(HfcompressError, match="outside its folder"):
        open_artifact(path)


@pytest.mark.parametrize(
    "backend",
    ["onnx_int8", {"use": "onnx_int8", "mode": "static"}, "onnx_int4", "onnx_fp16"],
    ids=["dynamic", "static", "int4", "fp16"],
)
@pytest.mark.usefixtures("in_process")
def test_a_graph_beyond_the_limit_of_protobuf_is_two_files(
    teacher: Path, tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfcompress.measure.verify import verify
    from hfcompress.models.dummy_inputs import make_dummy_inputs
    from hfcompress.onnx import graph_io as files
    from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob

    def made(name: str) -> tuple[Path, Any]:
        target = tmp_path / name
        target.mkdir()
        probe = make_dummy_inputs(teacher)
        job = QuantizationJob(teacher, target, AUTO, probe, rows=lambda _: [probe])
        return target, BACKENDS.parse(backend).quantize(job).logits

    _, expected = made("one")
    monkeypatch.setattr(files, "LIMIT", 2_000)
    path, logits = made("two")
    assert np.array_equal(logits, expected)
    artifact = open_artifact(path)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "onnx"]
    (graph, data) = artifact.weight_files
    assert sorted((path / "onnx").iterdir()) == [graph, data]
    assert data.name == f"{graph.name}_data"
    settings = json.loads((path / "config.json").read_text())["transformers.js_config"]
    assert settings["use_external_data_format"]
    assert artifact.dtype == open_artifact(tmp_path / "one").dtype
    assert verify(artifact, expected, AUTO)["onnx"] <= 1e-5


def test_optimum_s_quantizer_refuses_what_it_cannot_write() -> None:
    from dataclasses import replace

    from hfcompress.models.shape import shape_of
    from hfcompress.quantization.backends.base import BACKENDS

    shape = shape_of({"model_type": "bert"})
    backend = BACKENDS.parse("optimum_onnx")
    assert backend.problems(shape) == []
    (why,) = backend.problems(replace(shape, vocab=1_000_000))
    assert "the exported graph would be 3.4 GB" in why


# --- 16-bit checkpoints


def half(source: Path, path: Path, kind: torch.dtype, **config: Any) -> Path:
    copy_directory(source, path)
    with_tensors(path, {n: t.to(kind) for n, t in load_file(source / "model.safetensors").items()})
    return with_config(path, **config)


def test_what_is_stored_is_told_by_the_tensors(teacher: Path, tmp_path: Path) -> None:
    stored = half(teacher, tmp_path / "half", torch.bfloat16)  # its config says float32
    assert open_artifact(stored).dtype == stored_dtype(str(stored)) == "bfloat16"
    wide = with_config(copy_directory(teacher, tmp_path / "wide"), dtype="float16")
    assert open_artifact(wide).dtype == "float32"


def test_a_16_bit_checkpoint_is_loaded_in_float32_and_told_once(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = half(teacher, tmp_path / "half", torch.float16, dtype="float16")
    models = [load_model(path, AUTO) for _ in range(2)]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    assert capsys.readouterr().err.count("is stored in float16; it is loaded in float32") == 1
    assert models[0].config.dtype == torch.float32
    assert open_artifact(path).trainable


def test_a_16_bit_source_is_planned_by_its_bits_and_run_in_float32(
    teacher: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], worker: ModelProcess
) -> None:
    path = half(teacher, tmp_path / "half", torch.bfloat16, dtype="bfloat16")
    assert run_cli("check", recipe, "--set", f"model={path}") == 0
    assert run_cli("plan", recipe, "--set", f"model={path}") == 0
    artifact = open_artifact(path)
    assert artifact.shape is not None
    assert f"{artifact.shape.parameters * 2 / 1e6:.1f}" in capsys.readouterr().out
    assert [artifact.computed_on(device) for device in ("cpu", "cuda")] == ["float32", "bfloat16"]
    (path / "stage.json").write_text('{"stage": {"kind": "quantize"}}')
    assert open_artifact(path).computed_on("cpu") == "bfloat16"  # what our stage made runs as it is stored
    (path / "stage.json").unlink()  # a pushed model, and `final/`, have none: config.json says it
    with_config(path, hfcompress_stored_as="bfloat16")
    assert open_artifact(path).computed_on("cpu") == "bfloat16"
    worker.auto_class = AUTO
    worker.load(artifact, trust=False, register=None)
    assert worker.dtype == "float32"
    wide = worker.logits([BATCH])
    model = load_model(path, AUTO)
    from hfcompress.models.dummy_inputs import logits_of

    assert np.allclose(wide, logits_of(model, BATCH), atol=1e-5)


@pytest.mark.slow  # a run of two stages, and each model measured in a process of its own
def test_a_run_of_a_16_bit_source(teacher: Path, data: Path, tmp_path: Path) -> None:
    path = half(teacher, tmp_path / "half", torch.bfloat16, dtype="bfloat16")
    stages = [{"kind": "distill", "student": {"layers": 1, "init": "random"}, "losses": ["soft_labels"],
               "train": {"max_steps": 2, "batch_size": 8}}, {"kind": "quantize", "backend": "bfloat16"}]  # fmt: skip
    recipe = factories.recipe(tmp_path / "r.yaml", path, data, stages=stages)
    assert run_cli("run", recipe, "--output", tmp_path / "run") == 0
    student = load_file(tmp_path / "run" / "01-distill" / "model.safetensors")
    assert {t.dtype for t in student.values()} == {torch.float32}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    entries = [row["latency"][0] for row in report["rows"]]
    assert [(e["dtype"], e.get("stored")) for e in entries] == [
        ("float32", "bfloat16"), ("float32", None), ("bfloat16", None),
    ]  # fmt: skip
    assert report["rows"][0]["disk_bytes"] == (path / "model.safetensors").stat().st_size
    assert "source (stored in bfloat16) in float32" in (tmp_path / "run" / "report.md").read_text()
    # What our stage made runs as it is stored, whoever asks.
    assert open_artifact(tmp_path / "run" / "02-quantize").computed_on("cpu") == "bfloat16"


@pytest.mark.parametrize("backend", ["float16", "bfloat16"])
def test_what_a_half_precision_stage_stored_says_so_itself(teacher: Path, tmp_path: Path, backend: str) -> None:
    from hfcompress.models.dummy_inputs import make_dummy_inputs
    from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob

    BACKENDS.parse(backend).quantize(QuantizationJob(teacher, tmp_path, AUTO, make_dummy_inputs(teacher)))
    assert open_artifact(tmp_path).computed_on("cpu") == backend
    widened = load_model(tmp_path, AUTO)  # what a later run makes of it is float32, and no longer ours to keep narrow
    widened.save_pretrained(tmp_path / "wide")
    assert open_artifact(tmp_path / "wide").kind == "model"


def test_quantized_weights_are_not_trained(model: Path, said: Any) -> None:
    with_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "can be measured, but not trained or cut (torch int4)" in said("check", model)


# --- what a config claims

SIZES = ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size",
         "max_position_embeddings", "type_vocab_size"]  # fmt: skip
ABSURD: list[Any] = [10**9, 10**5 * 10**7, 10**400, -1, True, 12.0, "12", [12], {}, float("nan"), float("inf")]


@pytest.mark.parametrize("key", SIZES)
def test_sizes_that_no_model_has_are_refused(key: str) -> None:
    from hfcompress.models.shape import shape_of

    for value in ABSURD:
        if key == "max_position_embeddings" and value == 10**9:
            continue  # some models read far
        with pytest.raises(HfcompressError, match=key):
            shape_of({"model_type": "bert", key: value})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"id2label": {str(i): "x" for i in range(10**6)}}, "id2label with entries: 1000000"),
        ({"id2label": ["a", "b"]}, "id2label is"),
        ({"num_labels": 10**9}, "num_labels: 1000000000"),
        ({"num_labels": "2"}, "num_labels: '2'"),
        ({"per_layer_config": {"12": {}}}, "per_layer_config says '12'"),
        ({"per_layer_config": {"-1": {}}}, "per_layer_config"),
        ({"per_layer_config": {"0": 3}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"num_attention_heads": "4"}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"intermediate_size": 10**12}}}, "per_layer_config"),
        ({"per_layer_config": {"0": {"kept_heads": [1] * 99}}}, "per_layer_config"),
        ({"per_layer_config": [1, 2]}, "per_layer_config"),
        ({"model_type": ["bert"]}, "is not supported"),
        ({"model_type": "x" * 10**6}, "is not supported"),
        ({"model_type": "llama", "num_key_value_heads": -2}, "num_key_value_heads: -2"),
        ({"model_type": "llama", "head_dim": 1.5}, "head_dim: 1.5"),
        ({"position_embedding_type": [1, 2]}, "position_embedding_type"),
    ],
)
def test_what_a_config_says_beside_its_sizes_is_looked_at(config: Any, why: str) -> None:
    from hfcompress.models.shape import shape_of

    with pytest.raises(HfcompressError, match=why):
        shape_of({"model_type": "bert", **config})


@pytest.mark.parametrize("command", ["plan", "check", "doctor", "evaluate", "convert"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
def test_no_command_allocates_what_a_config_claims(
    model: Path, command: str, key: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_config(model, **{key: 10**9})
    arguments = {"doctor": [model], "evaluate": [model, "--task", recipe], "convert": [model, tmp_path / "new"]}
    assert run_cli(command, *arguments.get(command, [recipe, "--set", f"model={model}"])) == 2
    assert f"{key}: 1000000000, and at most 4,096 are allowed" in capsys.readouterr().err


def test_a_config_within_bounds_that_its_weights_belie_is_refused(model: Path, said: Any) -> None:
    with_config(model, vocab_size=10_000_000)
    assert "config.json describes" in said("evaluate", model)


def test_a_config_of_an_unknown_architecture_has_bounds_too(model: Path, said: Any) -> None:
    with_config(model, model_type="megatron-bert", num_hidden_layers=10**8)
    assert "num_hidden_layers: 100000000" in said("evaluate", model)
    with_config(model, num_hidden_layers=2, intermediate_size=10**9)
    assert "config.json describes 130,0" in said("evaluate", model)


@pytest.mark.parametrize(
    "change",
    [
        "stages.0.student.layers=1000000000", "stages.0.student.heads=1000000000", "stages.0.student.ffn=1000000000",
        "stages.0.student.hidden=1000000000", "stages.1.attention_blocks=1000000000", "stages.1.layers=1000000000",
        "stages.1.schedule={use: iterative, rounds: 1000000000}",
    ],
)  # fmt: skip
def test_sizes_of_a_recipe_have_bounds(recipe: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("plan", recipe, "--set", change) == 2
    assert "less than or equal to" in capsys.readouterr().err


# --- files that are none


def test_a_config_that_is_no_file(model: Path, said: Any) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    for command in ("evaluate", "check", "doctor"):
        assert "config.json is not a file" in said(command, model)
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert "config.json is not a file" in said("evaluate", model)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5_000 + b"}", "is not JSON"),
        (b" " * (65 << 20), "bytes, which no model's config has"),
        (b"{}", "names no model_type"),
        (b'{"model_type": "no-such-thing"}', "transformers knows no 'no-such-thing' model"),
    ],
    ids=["not UTF-8", "deep", "digits", "huge", "empty", "unknown"],
)
def test_a_config_that_cannot_be_read(model: Path, content: bytes, why: str, said: Any) -> None:
    (model / "config.json").write_bytes(content)
    assert why in said("evaluate", model)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 200 << 20) + b"{" + b" " * 99,
        struct.pack("<Q", 90) + b'{"bert.x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'.ljust(90),
        b"",
    ],
    ids=["beyond the file", "huge", "tensors beyond the file", "empty"],
)
def test_a_safetensors_header_that_lies(model: Path, header: bytes, said: Any) -> None:
    (model / "model.safetensors").write_bytes(header)
    with pytest.raises(HfcompressError, match=r"model\.safetensors is not a complete safetensors file"):
        load_model(model, AUTO)
    for command in ("evaluate", "check", "convert"):
        if command == "convert":
            assert run_cli("convert", model, model / "new") == 2
        else:
            assert "model.safetensors is not a complete safetensors file" in said(command, model)


def test_code_that_comes_with_a_model_is_not_run(model: Path, tmp_path: Path, said: Any) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    (model / "modeling_mine.py").write_text(code)
    with_config(model, model_type="mine", auto_map={"AutoConfig": "modeling_mine.C", AUTO: "modeling_mine.M"})
    told = said("evaluate", model)
    assert "foreign code is not run" in told
    with pytest.raises(HfcompressError, match="foreign code is not run"):
        load_model(model, AUTO)
    assert not ran.exists()


def test_a_model_without_a_tokenizer(teacher: Path, tmp_path: Path) -> None:
    bare = copy_directory(teacher, tmp_path / "bare", "tokenizer*")  # transformers would make one up that knows no word
    broken = copy_directory(teacher, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("[]")
    for path in (bare, broken):
        with pytest.raises(HfcompressError, match="holds no tokenizer that loads"):
            load_tokenizer(path)


def test_a_worker_that_the_system_killed_is_told_as_that(tmp_path: Path) -> None:
    path = graph(tmp_path / "g")
    with ModelProcess(open_artifact(path), AUTO, threads=1) as process:
        process._process.kill()
        with pytest.raises(WorkerError, match=r"died: it was killed, as systems do when they run out of memory"):
            process.time()
