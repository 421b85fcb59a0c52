"""Every shipped recipe, run from end to end: the file as it ships, with models and data that are tiny."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hfcompress.models.artifact import load_tokenizer
from hfcompress.models.shape import shape_of
from hfcompress.pruning.latency_table import LatencyTable
from hfcompress.quantization.backends.base import BACKENDS
from hfcompress.recipe.loader import Loaded, find_shipped, load
from hfcompress.recipe.plan import plan
from hfcompress.run import directory as run_directory
from hfcompress.run import finish, runner
from tests import factories
from tests.in_process import in_this_process

MEASURE = "measure={latency: {rounds: 1, rows: 4, threads: 1, cold_starts: 0, batch_sizes: [1, 2]}, bootstrap: 100}"
HAS_OPENVINO = BACKENDS.parse("openvino_int8").unavailable() is None
LEARNS, GOES_ON = (f"{{batch_size: 32, learning_rate: 5.0e-3, max_steps: {steps}}}" for steps in (60, 24))
"""Long enough to learn the data from scratch, and from a teacher."""


@dataclass(frozen=True)
class Things:
    """Tiny models and data for all recipes."""

    base: Path
    teacher: Path
    second: Path
    sentences: Path
    folder: Path

    def made(self, write: Callable[[Path], Path]) -> Path:
        """A data set of its own."""
        return write(self.folder / write.__name__)


def _tinybert(things: Things) -> list[str]:
    mlm = f"model: {things.base}, copies: 2, batch_size: 64, precision: float32"
    return [
        f"model={things.base}", f"task.dataset={things.sentences}", f"stages.0.train={LEARNS}",
        f"stages.1.task.dataset={things.made(factories.write_corpus)}", "stages.1.task.config=null",
        "stages.1.task.max_length=24", "stages.1.task.dev_rows=8",
        "stages.1.student={layers: 1, hidden: 16, ffn: 32, from: model}",
        "stages.1.train.max_steps=6", "stages.1.train.batch_size=8",
        f"stages.2.augment={{{mlm}}}", "stages.2.train.max_steps=6",
        f"stages.3.augment={{{mlm}}}", f"stages.3.train={LEARNS}",
    ]  # fmt: skip


def _minilm(things: Things) -> list[str]:
    heads = [f"stages.{stage}.losses.0.relation_heads=8" for stage in (1, 2)]
    return [
        f"model={things.base}", f"task.dataset={things.made(factories.write_inferences)}", f"stages.0.train={LEARNS}",
        "stages.0.train.max_steps=100",
        "stages.1.student={layers: 1, hidden: 16, ffn: 32, width: activation, rows: 32}", "stages.1.train.max_steps=6",
        f"stages.2.train={GOES_ON}", *heads,
    ]  # fmt: skip


def _fine_tuned(things: Things) -> list[str]:
    """The way that sst2-minilm.yaml tells to start from a fine-tuned model."""
    return [f"model={things.teacher}", f"task.dataset={things.sentences}", "stages.0.train.epochs=0"]


def _distilbert(things: Things) -> list[str]:
    student = "stages.1.student={layers: 1, layers_from: [1]}"
    return [*_fine_tuned(things), student, f"stages.1.train={GOES_ON}"]


def _ensemble(things: Things) -> list[str]:
    second = f"stages.1.teacher.models.1={things.second}"
    return [*_fine_tuned(things), second, "stages.1.student.layers=1", f"stages.1.train={GOES_ON}"]


def _intermediate(things: Things, write: Callable[[Path], Path]) -> list[str]:
    return [
        f"model={things.base}", f"task.dataset={things.made(write)}", f"stages.0.train={LEARNS}",
        "stages.1.student.layers=1", "stages.1.train.max_steps=6", f"stages.2.train={GOES_ON}",
    ]  # fmt: skip


def _stsb(things: Things) -> list[str]:
    base = factories.save(factories.model("distilbert").distilbert, things.folder / "distilbert")
    data = f"task.dataset={things.made(factories.write_similarities)}"
    return [
        f"model={base}", data, f"stages.0.train={LEARNS}", "stages.0.train.max_steps=100",
        "stages.1.student.layers=1", f"stages.1.train={GOES_ON}",
    ]  # fmt: skip


def _sst2_minilm(things: Things) -> list[str]:
    return [
        *_fine_tuned(things), "stages.1.student.layers=1", f"stages.1.train={GOES_ON}", "stages.2.recover.max_steps=4",
    ]  # fmt: skip


def _pruned(things: Things, *stage: str) -> list[str]:
    """A recipe whose second stage prunes a fine-tuned model; the rest is said of that stage."""
    return [*_fine_tuned(things), *(f"stages.1.{assignment}" for assignment in stage)]


def _trained(*blocks: str) -> list[str]:
    return [f"{block}.{key}" for block in blocks for key in ("max_steps=4", "batch_size=32", "learning_rate=1.0e-3")]


PRUNED: dict[str, tuple[str, ...]] = {
    "prune-heads-ffn": (
        "criterion.rows=32", "multiple_of=16", "sensitivity={rows: 16, shares: [0.5]}", *_trained("recover")
    ),
    "prune-latency": (
        "criterion.rows=32", "multiple_of=16", "sensitivity={rows: 16, shares: [0.5]}",
        "budget={latency: 0.8, batch_size: 2, length: 8, threads: 1}",
        *_trained("recover"),
    ),
    "prune-iterative": ("criterion.rows=32", "multiple_of=16", "schedule.rounds=2", *_trained("recover")),
    "prune-lottery": ("schedule={use: lottery, rounds: 1, rewind_steps: 2}", *_trained("train")),
    "prune-l0": (*_trained("train", "recover"),),
    "prune-movement": (*_trained("train"),),
    "prune-post-training": ("criterion.rows=32",),
    "prune-vocab": (),
    "prune-2of4": ("criterion.rows=32", *_trained("recover")),
}  # fmt: skip
"""What is said of the prune stage of each recipe that is about pruning."""


def _as_it_is(things: Things, *stage: str) -> list[str]:
    """A recipe that quantizes a fine-tuned model; the rest is said of its one stage."""
    assignments = (f"stages.0.{assignment}" for assignment in stage)
    return [f"model={things.teacher}", f"task.dataset={things.sentences}", *assignments]


def _nf4(things: Things) -> list[str]:
    """On a CPU bitsandbytes multiplies blocks of 64 inputs and 32 outputs."""
    wide = factories.fine_tuned(things.folder / "wide", things.sentences, layers=1, hidden=64)
    return [f"model={wide}", f"task.dataset={things.sentences}"]


def _pruned_as(name: str, things: Things) -> list[str]:
    return _pruned(things, *PRUNED[name])


def _smallest(things: Things) -> list[str]:
    cut = ("criterion.rows=32", "multiple_of=16", *_trained("recover"))
    ranked = [f"stages.3.{assignment}" for assignment in ("embedding_rank=4", *_trained("recover"))]
    return [*_pruned(things, *cut), *ranked]


OVERRIDES: dict[str, Callable[[Things], list[str]]] = {
    "tinybert": _tinybert,
    "minilm": _minilm,
    "distilbert": _distilbert,
    "ensemble": _ensemble,
    "ner": lambda things: _intermediate(things, factories.write_tags),
    "squad": lambda things: [*_intermediate(things, factories.write_questions), "task.max_length=24", "task.stride=8"],
    "sst2-minilm": _sst2_minilm,
    "stsb-distilbert": _stsb,
    **{name: partial(_pruned_as, name) for name in PRUNED},
    **({"openvino": lambda things: _as_it_is(things, "backend.rows=8")} if HAS_OPENVINO else {}),
    "int8-dynamic": _as_it_is,
    "int8-static": lambda things: _as_it_is(things, "backend.rows=32", "rows=16"),
    "qat": lambda things: _as_it_is(things, *_trained("train")),
    "onnx-int4": _as_it_is,
    "smallest": _smallest,
    "bnb-nf4": _nf4,
    "qlora": lambda things: [*_nf4(things), *(f"stages.0.{x}" for x in _trained("train"))],
}
ELSEWHERE = {"optimum-onnx", *([] if HAS_OPENVINO else ["openvino"])}
"""Recipes whose backend cannot run in this environment; planned here."""
FOUND = {"prune-latency", "prune-iterative", "prune-l0", "prune-post-training", "prune-vocab", "smallest"}
"""Recipes whose shape is found in the run: a plan tells about how much stays."""
CODED = {name for name in PRUNED if name not in ("prune-lottery", "prune-movement", "prune-vocab", "prune-2of4")}
"""Recipes that make a shape which stock transformers cannot load alone."""
CONFIGURED = {"ner", "squad"}
"""Recipes whose data set has no configuration to leave out."""


@dataclass(frozen=True)
class Finished:
    """A run."""

    loaded: Loaded
    directory: Path
    report: dict[str, Any]

    @property
    def final(self) -> Path:
        return self.directory / "final"

    @property
    def card(self) -> Any:
        from huggingface_hub import ModelCard

        return ModelCard((self.final / "README.md").read_text(encoding="utf-8"))

    @property
    def names(self) -> list[str]:
        """The models of the report."""
        return [row["stage"] for row in self.report["rows"]]

    def quality(self, row: int) -> float:
        return float(self.report["rows"][row]["quality"][self.loaded.recipe.task.metric])

    def notes(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / stage / "stage.json").read_text(encoding="utf-8"))
        return found

    def config(self, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / stage / "config.json").read_text(encoding="utf-8"))
        return found

    def answer(self, *texts: Any, **options: Any) -> Any:
        """What the final model, loaded as anybody would, answers to a text, a pair, or a list of words."""
        import torch
        import transformers

        model = getattr(transformers, self.loaded.recipe.task.auto_class).from_pretrained(self.final, dtype="auto")
        with torch.inference_mode():
            return model.eval()(**load_tokenizer(self.final)(*texts, return_tensors="pt", **options))


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, teacher: Path, data: Path) -> Things:
    folder = tmp_path_factory.mktemp("things")
    base = factories.save(factories.model(head="mask"), folder / "base")
    words = [word for word in factories.WORDS if word not in ("film", "story")]
    second = factories.fine_tuned(folder / "electra", data, "electra", words=[*words[:5], *reversed(words[5:])])
    return Things(base, teacher, second, data, folder)


Ran = Callable[[str], Finished]


@pytest.fixture(scope="module")
def ran(things: Things, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """Runs a shipped recipe, once for all tests that look at it."""
    kept: dict[str, Finished] = {}
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Finished:
        if name not in kept:
            config = [] if name in CONFIGURED else ["task.config=null"]
            loaded = load(find_shipped()[name], [MEASURE, "task.max_length=32", *config, *OVERRIDES[name](things)])
            done = runner.run(loaded, folder / name)
            assert done is not None
            kept[name] = Finished(loaded, done.directory, done.report)
        return kept[name]

    with in_this_process(), mock.patch("hfcompress.pruning.state.find_table", _make_table):
        yield run


def _make_table(model: Any, _setting: Any) -> LatencyTable:
    """Times as a quiet machine might give them: on a busy one, parts of a tiny model seem to take no time."""
    layers = shape_of(model.config.to_dict()).layers
    heads, neurons = max(layer.heads for layer in layers), max(layer.ffn for layer in layers)
    return LatencyTable(1e-4, tuple((n, n * 1e-3) for n in range(heads + 1)), ((0, 0.0), (neurons, neurons * 1e-4)), 1)


def test_every_shipped_recipe_is_run() -> None:
    """The quickstart, which brings its own model and data, is run by test_quickstart.py."""
    assert {*OVERRIDES, *ELSEWHERE, "quickstart"} == {*find_shipped()}


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_what_runs_elsewhere_is_planned_here(name: str, things: Things) -> None:
    source, quantized = plan(load(find_shipped()[name], ["task.config=null", "task.max_length=32", *_as_it_is(things)]))
    assert quantized.shape.bytes < 0.5 * source.shape.bytes


PIPELINES = {"ner": ("token-classification", "f1"), "squad": ("question-answering", "f1"),
             "stsb-distilbert": ("text-classification", "pearson")}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDES)
def test_it_makes_what_it_plans_and_its_card_tells_of_it(name: str, ran: Ran) -> None:
    done = ran(name)
    planned = {row.stage: row.shape for row in plan(done.loaded)}
    source = "01-finetune" if "01-finetune" in planned else "model"
    for row in done.report["rows"][: 1 if name in FOUND else None]:
        expected = planned[source if row["stage"] == "source" else row["stage"]]
        assert row["parameters"] == expected.parameters
        assert row["macs"] == expected.macs(done.loaded.recipe.task.max_length)
    pipeline, metric = PIPELINES.get(name, ("text-classification", "accuracy"))
    metadata = done.card.data
    assert metadata.pipeline_tag == pipeline
    (result,) = metadata.eval_results
    assert (result.task_type, result.metric_type) == (pipeline, metric)
    assert result.metric_value == pytest.approx(done.quality(-1), abs=1e-6)
    for stage in done.loaded.recipe.stages:
        assert f"**{stage.kind}**" in done.card.content


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_same_command_again_does_nothing(name: str, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ran(name)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done before")

    monkeypatch.setattr(runner, "_run_stage", never)
    monkeypatch.setattr(finish, "measure", never)
    again = runner.run(done.loaded, done.directory)
    assert again is not None
    assert again.report == done.report


@pytest.mark.parametrize("name", sorted(set(OVERRIDES) - CODED))
def test_the_snippet_of_its_card_answers(name: str, ran: Ran) -> None:
    """Stock transformers or onnxruntime alone; the one of a pruned model, which runs its code, is in test_run.py."""
    done = ran(name)
    snippet = re.search(r"```python\n(.*?)```", done.card.content, re.DOTALL)
    assert snippet is not None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(snippet[1].replace("PATH_OR_REPO", str(done.final)), {})
    assert printed.getvalue().strip() or name == "squad"


def test_all_that_tinybert_needs_of_the_hub_is_fetched_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_directory, "model_directory", Path)
    monkeypatch.setattr(run_directory, "revision_of", lambda _: "commit")
    monkeypatch.setattr(
        run_directory, "data_revision", lambda _, __, streaming: "listed" if streaming else "downloaded"
    )
    loaded = load(find_shipped()["tinybert"], ["stages.2.augment.model=user/mlm"])
    assert run_directory.find_revisions(loaded) == {
        "google-bert/bert-base-uncased": "commit", "user/mlm": "commit", "datasets/nyu-mll/glue": "downloaded",
        "datasets/wikimedia/wikipedia": "listed",
    }  # fmt: skip


def test_tinybert(ran: Ran) -> None:
    done = ran("tinybert")
    assert done.names == ["source", "03-distill", "04-distill"]
    assert done.notes("01-finetune")["dev"] > 0.9

    general = done.notes("02-distill")
    assert done.config("02-distill")["architectures"] == ["BertForMaskedLM"]
    assert general["teacher"] == {"stage": "model", "dev": None}
    assert general["student"]["layer 1"].endswith("from layer 2")

    middle, last = done.notes("03-distill"), done.notes("04-distill")
    assert done.config("03-distill")["architectures"] == ["BertForSequenceClassification"]
    assert done.config("03-distill")["id2label"] == done.config("01-finetune")["id2label"]
    for record in (middle, last):
        assert record["teacher"] == {"stage": "source", "dev": done.notes("01-finetune")["dev"]}
        assert record["augment"]["originals"] == 96
        assert 96 < record["augment"]["generated"] <= 2 * 96
    assert middle["augment"] == last["augment"]  # made once
    assert "student" not in middle
    assert last["dev"] > 0.8
    assert (done.config("final")["num_hidden_layers"], done.config("final")["hidden_size"]) == (1, 16)
    assert "write_corpus" in done.card.content
    assert "2 new rows for each" in done.card.content


def test_minilm(ran: Ran) -> None:
    done = ran("minilm")
    assert done.names == ["source", "02-distill", "03-distill"]
    assert done.report["task"]["split"] == "test"
    assert [row["quality"]["n"] for row in done.report["rows"]] == [36] * 3
    assert "activation" in str(done.notes("02-distill")["student"])
    assert len(done.config("final")["id2label"]) == 3
    assert done.quality(0) > 0.9
    assert done.quality(2) > max(done.quality(1), 0.6)
    logits = done.answer("the film was", "a story was lovely").logits
    assert logits.argmax().item() == 0


def test_distilbert(ran: Ran) -> None:
    done = ran("distilbert")
    assert done.names == ["source", "02-distill"]
    assert done.notes("02-distill")["student"]["layer 1"] == "copied from layer 1"
    assert done.answer("the film was great").logits.argmax().item() == 1
    assert done.answer("the film was awful").logits.argmax().item() == 0


def test_ensemble(ran: Ran, things: Things) -> None:
    done = ran("ensemble")
    assert done.names == ["source", "02-distill"]
    teachers = done.notes("02-distill")["teacher"]
    assert [teacher["stage"] for teacher in teachers] == ["source", str(things.second)]
    assert all(teacher["dev"] > 0.9 for teacher in teachers)
    assert done.quality(1) > 0.8
    assert f"`{things.second.name}`" in done.card.content
    assert str(things.second) not in done.card.content  # it means nothing elsewhere


def test_ner(ran: Ran) -> None:
    done = ran("ner")
    assert done.names == ["source", "02-distill", "03-distill"]
    assert done.quality(0) > 0.9
    assert done.quality(2) > 0.9
    names = {int(index): name for index, name in done.config("final")["id2label"].items()}
    assert names[0] == "O"
    logits = done.answer([["the", "film", "good", "lovely", "was", "bad", "a"]], is_split_into_words=True).logits
    assert [names[index] for index in logits[0, 1:-1].argmax(-1).tolist()] == [
        "O", "O", "B-GOOD", "I-GOOD", "O", "B-BAD", "O",
    ]  # fmt: skip


def test_squad(ran: Ran) -> None:
    done = ran("squad")
    assert done.names == ["source", "02-distill", "03-distill"]
    assert done.report["rows"][0]["quality"]["n"] == 32  # questions, of which some have two windows
    assert done.quality(0) > 0.9
    assert done.quality(2) > 0.9
    found = done.answer("was it", "the story was great and it")
    assert (found.start_logits.argmax().item(), found.end_logits.argmax().item()) == (7, 7)


def test_sst2_minilm(ran: Ran) -> None:
    done = ran("sst2-minilm")
    assert done.names == ["source", "02-distill", "03-prune", "04-quantize"]
    kept = done.notes("03-prune")["kept"]
    assert (kept["heads"], kept["ffn"]) == ([[3, 4]], [[40, 64]])
    assert done.notes("03-prune")["teacher"]["stage"] == "source"
    assert [row["latency"][0]["runtime"] for row in done.report["rows"]] == [*["torch"] * 3, "onnxruntime"]
    assert "onnx" in done.card.data.tags


def test_stsb_distilbert(ran: Ran) -> None:
    import torch

    done = ran("stsb-distilbert")
    assert done.names == ["source", "02-distill", "03-quantize"]
    assert done.quality(0) > 0.9
    assert done.quality(2) > 0.7
    good, bad = (done.answer(text, text).logits for text in ("the film was great", "the film was awful"))
    assert good.dtype == torch.bfloat16
    assert good.item() > bad.item() + 2


def test_prune_heads_ffn(ran: Ran) -> None:
    done = ran("prune-heads-ffn")
    assert done.names == ["source", "02-prune"]
    kept = done.notes("02-prune")["kept"]
    assert sum(heads for heads, _ in kept["heads"]) == 5
    assert sum(ffn for ffn, _ in kept["ffn"]) == 64
    assert done.quality(1) > 0.8
    assert done.answer("the film was great").logits.argmax().item() == 1
    for picture in ("02-prune-kept.png", "02-prune-sensitivity.png"):
        assert (done.final / picture).is_file()
        assert picture in done.card.content


def test_prune_latency(ran: Ran) -> None:
    done = ran("prune-latency")
    latency = done.notes("02-prune")["latency"]
    assert latency["predicted_ms"] <= latency["target_ms"] < latency["source_ms"]
    assert latency["measured_ms"] > 0
    assert "02-prune-latency.png" in done.card.content


@pytest.mark.parametrize(("name", "share"), [("prune-iterative", 0.33), ("prune-post-training", 0.5)])
def test_prune_to_macs(name: str, share: float, ran: Ran) -> None:
    done = ran(name)
    source, pruned = done.report["rows"]
    assert pruned["macs"] < (share + 0.05) * source["macs"]
    assert done.quality(1) > 0.7


def test_prune_l0(ran: Ran) -> None:
    source, pruned = ran("prune-l0").report["rows"]
    assert 0.3 < pruned["encoder_parameters"] / source["encoder_parameters"] <= 0.41


@pytest.mark.parametrize(("name", "share"), [("prune-lottery", 0.6), ("prune-movement", 0.85), ("prune-2of4", 0.5)])
def test_zeros(name: str, share: float, ran: Ran) -> None:
    done = ran(name)
    sparsity = done.notes("02-prune")["sparsity"]
    assert sparsity["share"] == pytest.approx(share, abs=0.01)
    assert sparsity["sparse_bytes"] < sparsity["dense_bytes"]
    assert "zeros" in done.card.content


def test_prune_vocab(ran: Ran) -> None:
    done = ran("prune-vocab")
    assert done.quality(1) == done.quality(0)
    assert done.config("02-prune")["vocab_size"] <= len(factories.WORDS)


def test_the_two_that_only_quantize(ran: Ran) -> None:
    for name, dtype in (("int8-dynamic", "int8"), ("bnb-nf4", "nf4")):
        done = ran(name)
        assert done.names == ["source", "01-quantize"]
        assert done.report["rows"][1]["latency"][0]["dtype"] == dtype
        assert done.quality(1) > 0.9
