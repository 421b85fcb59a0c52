"""The quantize stage: what it refuses, and mixed precision under an accuracy budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hfcompress.context import StageContext
from hfcompress.models.artifact import load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.linears import linears
from hfcompress.models.shape import shape_of
from hfcompress.quantization import mixed_precision
from hfcompress.quantization.backends.base import BACKENDS, Backend, QuantizationJob, QuantizedModel
from hfcompress.quantization.facts import QuantizationFacts
from hfcompress.quantization.mixed_precision import find_fewest, group_fused_layers
from hfcompress.quantization.stage import Quantize
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.utils.errors import HfcompressError
from tests import factories


class Coarse(Backend):
    """Each weight without its sign; the model stays a float32 one, so that any test can read it."""

    keeps_layers: ClassVar[bool] = True

    def plan(self, shape: Any) -> Any:
        return shape

    def fake_quantize(self, weight: Any) -> Any:
        return weight.abs()

    def quantize(self, job: QuantizationJob) -> QuantizedModel:
        model = load_model(job.source, job.auto_class)
        for path in set(linears(model)) - job.keep:
            layer = model.get_submodule(path)
            layer.weight.data = self.fake_quantize(layer.weight.data)
        save_model(model, factories.tokenizer(), job.target)
        return QuantizedModel(logits_of(model, job.dummy_inputs))


@pytest.fixture
def context(tmp_path: Path, teacher: Path, data: Path, in_process: None) -> StageContext:
    recipe = load(factories.recipe(tmp_path / "r.yaml", teacher, data)).recipe
    source = open_artifact(teacher)
    (tmp_path / "work" / "model").mkdir(parents=True)
    return StageContext(recipe.task, 0, source, {}, tmp_path / "work")


def stage(**options: Any) -> Quantize:
    return Quantize.model_validate({"kind": "quantize", "backend": Coarse(), **options})


def run(options: Quantize, context: StageContext) -> tuple[Any, dict[str, Any]]:
    """Returns the logits, and the facts about the search as JSON."""
    path = context.source.path
    job = QuantizationJob(path, context.model_directory, context.task.auto_class, make_dummy_inputs(path))
    model, found = mixed_precision.search_mixed_precision(options, job, context)
    return model.logits, QuantizationFacts(mixed=found).to_json()["mixed"]


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 16])
def test_the_fewest_layers_that_hold_are_found_in_few_tries(most: int) -> None:
    for least in range(1, most + 2):
        asked: list[int] = []

        def holds(count: int, least: int = least, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= least

        find_fewest(most, holds)
        if least <= most:
            assert least in asked
            assert least == 1 or least - 1 in asked
        assert len(set(asked)) <= 2 * most.bit_length() + 1
        assert all(0 < count <= most for count in asked)


def test_the_most_sensitive_layers_stay_in_float_until_the_budget_holds(context: StageContext) -> None:
    model = load_model(context.source.path, context.task.auto_class)
    logits, notes = run(stage(max_drop=5.0), context)
    assert notes["holds"]
    chosen = next(a for a in notes["tried"] if a["keep"] == len(notes["kept"]))
    assert chosen["drop"] <= 5 < notes["tried"][0]["drop"]
    assert notes["tried"][0]["keep"] == 0
    ranked = [path for x in notes["layers"] for path in x["layers"]]
    assert notes["kept"] == ranked[: len(notes["kept"])]
    assert sorted(ranked) == sorted(linears(model))
    assert [x["error"] for x in notes["layers"]] == sorted((x["error"] for x in notes["layers"]), reverse=True)
    assert not any(a["keep"] < chosen["keep"] and a["drop"] <= 5 for a in notes["tried"])
    saved = load_model(context.model_directory, context.task.auto_class)
    assert np.array_equal(logits_of(saved, make_dummy_inputs(context.source.path)), logits)
    kept = model.get_submodule(notes["kept"][0])
    assert torch.equal(saved.get_submodule(notes["kept"][0]).weight, kept.weight)
    assert not (context.directory / "attempts").exists()


def test_a_layer_s_sensitivity_is_the_effect_of_rounding_it_alone(context: StageContext) -> None:
    _, facts = run(stage(max_drop=5.0, rows=16), context)
    from hfcompress.training.evaluate import predict

    worst = facts["layers"][0]
    model = load_model(context.source.path, context.task.auto_class)
    rows = context.encode("dev", factories.tokenizer(), dict(model.config.label2id)).shuffle(seed=0).select(range(16))
    before, _ = predict(model, rows, factories.tokenizer(), context.task)
    layer = model.get_submodule(worst["layers"][0])
    layer.weight.data = layer.weight.data.abs()
    after, order = predict(model, rows, factories.tokenizer(), context.task)
    assert worst["error"] == pytest.approx(float(np.linalg.norm(after - before) / np.linalg.norm(before)), rel=1e-5)
    assert worst["metric"] == context.task.score(*context.task.judge(after, rows.select(order)))


def test_layers_that_a_graph_makes_one_are_kept_and_rounded_together() -> None:
    for family in ("bert", "llama", "modernbert", "albert"):
        model = factories.model(family)
        groups = group_fused_layers(model)
        assert sorted(path for paths in groups for path in paths) == sorted(linears(model))
        sizes = sorted(len(paths) for paths in groups)
        largest = {"bert": [3, 3], "llama": [2, 2, 3, 3], "modernbert": [], "albert": [3]}[family]
        assert [n for n in sizes if n > 1] == largest
    assert ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj") in group_fused_layers(
        factories.model("llama")
    )


def test_a_budget_that_all_layers_hold_is_met_at_once(context: StageContext) -> None:
    _, notes = run(stage(max_drop=100.0), context)
    assert (notes["kept"], notes["holds"], len(notes["tried"]), notes["layers"]) == ([], True, 1, [])


def test_where_nothing_holds_the_best_attempt_is_kept_and_said_to_be_short(
    context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "stays_within", lambda search, attempt: False)
    _, notes = run(stage(max_drop=0.1), context)
    assert not notes["holds"]
    assert notes["tried"][-1]["keep"] == len(notes["layers"])
    least = min(notes["tried"], key=lambda a: a["drop"])
    assert len(notes["kept"]) == least["keep"]
    assert (context.model_directory / "model.safetensors").is_file()


def test_simulating_leaves_the_model_as_it_was() -> None:
    model = factories.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job: Any = None
    with Coarse().simulate(model, linears(model), job):
        assert model.classifier.weight.min() >= 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "key", "message"),
    [
        ({"backend": "float16", "max_drop": 0.5}, ("max_drop",), "no way to leave single layers in float32"),
        ({"backend": "onnx_int8", "rows": 8}, ("rows",), "`rows` is for `max_drop`"),
        ({"backend": "float16", "train": {}}, ("train",), "cannot be trained for float16"),
        ({"backend": "bnb_4bit", "train": {}}, ("train", "lora"), "there are no adapters"),
        (
            {"backend": {"use": "onnx_int8", "mode": "static"}, "train": {"lora": {"r": 4}}},
            ("train", "lora"),
            "trains all weights",
        ),
        (
            {"backend": "bnb_4bit", "train": {"lora": {"r": 4}}, "max_drop": 1.0},
            ("max_drop",),
            "`max_drop` makes several",
        ),
        ({"backend": "bnb_4bit", "train": {"lora": {"r": 4}, "freeze": 0.3}}, ("train", "freeze"), "`freeze` is for"),
        ({"backend": {"use": "onnx_int8", "per_channel": False}, "train": {}}, ("train",), "share one scale"),
        ({"backend": "onnx_int4", "train": {"freeze": 0.3}}, ("train", "freeze"), "`freeze` is for fixed ranges"),
        ({"backend": "onnx_int8", "train": {"ranges": "learned"}}, ("train", "ranges"), "has none with these options"),
        (
            {"backend": {"use": "onnx_int8", "mode": "static", "per_channel": False}, "train": {"ranges": "learned"}},
            ("train", "ranges"),
            "one scale for each output channel",
        ),
    ],
)
def test_what_would_change_nothing_or_cannot_be_is_refused(options: dict[str, Any], key: Any, message: str) -> None:
    shape = shape_of(factories.model(hidden=64, ffn=128).config.to_dict())
    task: Any = type("Task", (), {"is_streamed": False, "head": "sequence", "max_length": 16})
    found = Quantize.model_validate({"kind": "quantize", **options}).problems(shape, {"parent": shape}, task)
    assert [(p.key, message in p.message) for p in found] == [(key, True)]


def test_a_plan_needs_nothing_installed_and_a_check_does(
    tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKENDS.get("onnx_int8"), "unavailable", lambda self: ("no such machine", "buy one"))
    loaded = load(factories.recipe(tmp_path / "r.yaml", teacher, data))
    assert check(loaded, weights=False)
    with pytest.raises(HfcompressError, match="no such machine"):
        check(loaded)


@pytest.mark.usefixtures("in_process")
def test_a_whole_run_tells_what_was_tried_in_its_card(tmp_path: Path, teacher: Path, data: Path) -> None:
    from hfcompress.run.runner import run as run_

    stages = [{"kind": "quantize", "backend": "onnx_int8", "max_drop": 0.5}]
    done = run_(load(factories.recipe(tmp_path / "r.yaml", teacher, data, stages=stages)), tmp_path / "run")
    assert done is not None
    notes = json.loads((tmp_path / "run" / "01-quantize" / "stage.json").read_text())["mixed"]
    assert done.report["rounded"]["01-quantize"]["mixed"] == notes
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "## What was rounded" in card
    assert "layers left in float32 until at most 0.5 points are lost" in card
    assert f"| {notes['tried'][0]['keep']} | {notes['tried'][0]['metric']:.4f} |" in card
