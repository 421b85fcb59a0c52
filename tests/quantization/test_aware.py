"""Quantization-aware training: the published formulas, and that what was trained is what ONNX Runtime computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hfcompress.context import StageContext
from hfcompress.models.artifact import load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import observe
from hfcompress.models.linears import linears
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.calibration import calibrate
from hfcompress.quantization.grids.ranges import Ranges, scale_and_zero_point
from hfcompress.quantization.grids.rowwise import fake_quantize_rowwise
from hfcompress.quantization.qat.fake_quantization import FakeQuantization
from hfcompress.quantization.qat.learned_steps import RATE, LearnedStepSizes
from hfcompress.quantization.qat.moving_average import MOMENTUM, MovingAverageRanges
from hfcompress.recipe.loader import load
from tests import factories, masked

AUTO = "AutoModelForSequenceClassification"
QUERY = "bert.encoder.layer.0.attention.self.query"


def literal_weights(weight: Tensor) -> Tensor:
    """Symmetric int8 with a step a row, `max |w| / 127`, by PyTorch."""
    steps = weight.detach().abs().amax(1) / 127
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.detach(), steps, zeros, 0, -127, 127)


def literal_inputs(values: Tensor, low: float, high: float) -> Tensor:
    """Jacob et al. 2018, eq. 12, `s (clamp(round(x / s) + z, 0, 255) - z)`, by PyTorch."""
    step = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(values, step, round(-low / step), 0, 255)


def batches(count: int = 3) -> list[dict[str, Any]]:
    return [{name: tensor.numpy() for name, tensor in factories.batch(seed=seed).items()} for seed in range(count)]


def followed(model: Any, freeze: float = 1.0, table_bits: Any = None) -> MovingAverageRanges:
    return MovingAverageRanges(model, literal_weights, calibrate(model, batches(), "minmax"), freeze, table_bits)


def learned(model: Any, freeze: float = 1.0, table_bits: Any = None) -> LearnedStepSizes:
    return LearnedStepSizes(model, calibrate(model, batches(), "minmax"), freeze, table_bits)


KINDS: dict[str, Callable[[Any], FakeQuantization]] = {
    "followed": lambda model: followed(model, 0.5, 8),
    "learned": lambda model: learned(model, 0.5, 8),
}


def backward(model: Any, masks: FakeQuantization, progress: float = 0.0, seed: int = 0) -> None:
    with masks.lay_over(model, progress):
        observe(model, factories.batch(seed=seed)).logits.square().mean().backward()


# What it computes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_it_computes_with_rounded_weights_inputs_and_rows(kind: str) -> None:
    model, literal = factories.model(), factories.model()
    masks = KINDS[kind](model).eval()
    bounds = calibrate(model, batches(), "minmax").inputs
    with torch.no_grad():
        for path, layer in linears(literal).items():
            layer.weight.copy_(literal_weights(layer.weight))
            layer.register_forward_pre_hook(lambda _m, x, b=bounds[path]: literal_inputs(x[0], *b))
        for table in literal.modules():
            if isinstance(table, nn.Embedding):
                table.weight.copy_(literal_weights(table.weight))
        plain = observe(model, factories.batch()).logits
        with masks.lay_over(model, 1.0):
            found = observe(model, factories.batch()).logits
    torch.testing.assert_close(found, observe(literal, factories.batch()).logits, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-4
    assert len(bounds) == 14  # six in each of two layers, pooler and head


def test_gradients_go_straight_through_rounded_weights_and_rows() -> None:
    model, literal = factories.model(), factories.model()
    with torch.no_grad():
        for name, parameter in literal.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(literal_weights(parameter))
                assert not torch.equal(parameter, model.get_parameter(name))
    backward(model, FakeQuantization(literal_weights, 8))
    observe(literal, factories.batch()).logits.square().mean().backward()
    for name, parameter in literal.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_inputs_beyond_their_range_get_no_gradient() -> None:
    model = factories.model()
    start = Ranges(dict.fromkeys(linears(model), (-1.0, 1.55)))  # steps of 0.01
    read = MovingAverageRanges(model, literal_weights, start, 1.0).input_roundings(1.0)[QUERY]
    values = torch.tensor([-7.0, -1.004, -1.0, -0.5049, 0.0, 1.554, 1.56, 9.0], requires_grad=True)
    found = read(values)
    found.backward(torch.arange(1.0, 9.0))
    assert found.tolist() == pytest.approx([-1, -1, -1, -0.5, 0, 1.55, 1.55, 1.55], abs=1e-5)
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]


def test_a_mask_head_reads_the_words_table_as_it_gathers_it() -> None:
    model = factories.model(head="mask")
    masks = FakeQuantization(literal_weights, 8)
    model.train()
    with masks.lay_over(model, 0.0):
        observe(model, factories.batch()).logits.square().mean().backward()
        decoder = model.get_output_embeddings().weight
        torch.testing.assert_close(decoder, literal_weights(model.get_input_embeddings().weight))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_words_have_four_bits_and_other_tables_eight() -> None:
    model = factories.model()
    masks = FakeQuantization(nn.Identity(), 4)
    own = model.bert.embeddings
    ids = torch.arange(8).view(2, 4)
    with masks.lay_over(model, 0.0):
        words, places = own.word_embeddings(ids), own.position_embeddings(ids)
    torch.testing.assert_close(words, fake_quantize_rowwise(own.word_embeddings.weight, 4)[ids])
    torch.testing.assert_close(places, literal_weights(own.position_embeddings.weight)[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_gone_afterwards(kind: str) -> None:
    model = factories.model()
    masks, before = KINDS[kind](model), dict(model.named_parameters())
    wanted = observe(model, factories.batch()).logits

    def interrupted() -> None:
        with masks.lay_over(model, 0.0):
            assert not torch.equal(observe(model, factories.batch()).logits, wanted)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(observe(model, factories.batch()).logits, wanted)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(dict(model.named_parameters())) == list(before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# Ranges that follow


def test_ranges_follow_the_rows_without_their_padding() -> None:
    """Jacob et al. 2018, section 3.1: `r ← m r + (1 - m) r_batch`, and 0 is within."""
    model = factories.model()
    masks, seen = followed(model), {}
    before = masks.ranges().inputs
    batch = factories.batch(seed=9)
    real = batch["attention_mask"].bool()

    def look(path: str) -> Any:
        def hook(_module: Any, inputs: Any) -> None:
            values = inputs[0][real] if inputs[0].dim() == 3 else inputs[0]
            seen[path] = min(0.0, values.min().item()), max(0.0, values.max().item())

        return hook

    for path, layer in linears(model).items():
        layer.register_forward_pre_hook(look(path))
    with masks.lay_over(model, 0.0):
        observe(model, batch)
    masks.after_step(model, 1, 10)
    assert len(seen) == 14
    for path, bounds in masks.ranges().inputs.items():
        wanted = [MOMENTUM * r + (1 - MOMENTUM) * b for r, b in zip(before[path], seen[path], strict=True)]
        assert list(bounds) == pytest.approx(wanted, rel=1e-5)
        assert bounds != before[path]


def test_a_step_of_several_batches_spans_them_and_no_others() -> None:
    model = factories.model()

    def after(masks: MovingAverageRanges, *seeds: int) -> Tensor:
        for seed in seeds:
            with masks.lay_over(model, 0.0):
                observe(model, factories.batch(seed=seed))
        seen = masks.seen.clone()
        masks.after_step(model, 1, 10)
        return seen

    several = followed(model)
    both = after(several, 3, 4)
    first, second = after(followed(model), 3), after(followed(model), 4)
    assert torch.equal(both[0], first[0].minimum(second[0]))
    assert torch.equal(both[1], first[1].maximum(second[1]))
    fresh = followed(model)
    fresh.range.copy_(several.range)
    alone = after(fresh, 3)
    assert torch.equal(after(several, 3), alone)
    assert not torch.equal(both, alone)


def test_a_layer_that_runs_again_and_again_has_one_range_over_its_runs() -> None:
    model = factories.model("albert", layers=3)
    masks = followed(model)
    assert len(masks.read) == 6 + 3  # one layer; the mapping of the embeddings, pooler and head
    path, ran = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn", list[float]()
    real = factories.batch()["attention_mask"].bool()
    linears(model)[path].register_forward_pre_hook(lambda _m, x: ran.append(x[0][real].max().item()))
    with masks.lay_over(model, 0.0):
        observe(model, factories.batch())
    assert len(ran) == 3
    assert masks.seen[1, masks.read.index(path)].item() == pytest.approx(max(ran))


# Steps that are learned


def literal_lsq(value: float, step: float, first: int, last: int) -> float:
    """Esser et al. 2020, eq. 3."""
    v = value / step
    return first if v < first - 0.5 else last if v > last + 0.5 else round(v) - v


def test_steps_of_weights_get_the_published_gradient() -> None:
    """`∂L/∂log s = s g Σ ∂L/∂v̂ · ∂v̂/∂s`, `g = 1 / sqrt(N Q)`."""
    model = factories.model()
    masks = learned(model)
    with torch.no_grad():
        masks.log_weights.sub_(0.7)  # so that weights are clipped
    rounded = masks.round_weights(model)[QUERY]
    flow = torch.randn(rounded.shape, generator=torch.Generator().manual_seed(0))
    rounded.backward(flow)
    weight = model.get_parameter(f"{QUERY}.weight")
    place = sum(masks.sizes[: masks.paths.index(QUERY)])
    assert masks.log_weights.grad is not None
    for row in (0, 7):
        step = math.exp(masks.log_weights[place + row].item())
        values = weight[row].tolist()
        slopes = [literal_lsq(w, step, -127, 127) for w in values]
        assert max(map(abs, slopes)) == 127
        wanted = step * sum(f * d for f, d in zip(flow[row].tolist(), slopes, strict=True)) / math.sqrt(32 * 127)
        assert masks.log_weights.grad[place + row].item() == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        inside = torch.tensor([float(abs(d) < 1) for d in slopes])
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad[row], flow[row] * inside)  # eq. 5
        stored = [step * min(127, max(-127, round(w / step))) for w in values]
        assert rounded[row].tolist() == pytest.approx(stored, rel=1e-4, abs=1e-7)


def test_steps_of_inputs_get_the_published_gradient() -> None:
    model = factories.model()
    masks = LearnedStepSizes(model, Ranges(dict.fromkeys(linears(model), (-1.0, 1.55))), 1.0)
    values = torch.tensor([[-1.3, -0.4243, 0.7777, 2.5]], requires_grad=True)
    flow = torch.tensor([[1.0, 2.0, 3.0, -5.0]])
    found = masks.input_roundings(0.0)[QUERY](values)
    found.backward(flow)
    assert found[0].tolist() == pytest.approx([-1.0, -0.42, 0.78, 1.55], abs=1e-5)
    slopes = [literal_lsq(v, 0.01, -100, 155) for v in values[0].tolist()]
    wanted = 0.01 * sum(f * d for f, d in zip(flow[0].tolist(), slopes, strict=True)) / math.sqrt(4 * 155)
    assert masks.log_inputs.grad is not None
    assert masks.log_inputs.grad.tolist() == pytest.approx([wanted], rel=1e-3)
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 2, 3, 0]]


def test_layers_that_read_the_same_tensor_share_a_step() -> None:
    masks = learned(factories.model())
    parts = [QUERY.replace("query", part) for part in ("query", "key", "value")]
    assert len({masks.read[path] for path in parts}) == 1
    assert len(masks.log_inputs) == 2 * 4 + 2
    with torch.no_grad():
        masks.log_inputs[masks.read[QUERY]] += 0.5
    inputs = masks.ranges().inputs
    assert len({inputs[path] for path in parts}) == 1


def test_steps_have_a_learning_rate_of_their_own_and_do_not_decay() -> None:
    masks = learned(factories.model())
    (group,) = masks.parameter_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in masks.parameters()}
    assert (group["lr"], group["weight_decay"]) == (RATE, 0)


# While a model trains


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_freeze(kind: str) -> None:
    model = factories.model().train()
    masks = KINDS[kind](model)  # frozen after half of the steps
    optimizer = torch.optim.AdamW([*model.parameters(), *masks.parameters()], lr=1e-2)
    seen = [masks.ranges()]
    for step in range(1, 7):
        optimizer.zero_grad()
        backward(model, masks, (step - 1) / 6, seed=step)
        optimizer.step()
        masks.after_step(model, step, 6)
        seen.append(masks.ranges())
    changed = [before.inputs != after.inputs for before, after in pairwise(seen)]
    assert changed == [True, True, True, False, False, False]
    steps = [all(torch.equal(a.scales[path], b.scales[path]) for path in a.scales) for a, b in pairwise(seen)]
    assert steps == ([True] * 6 if kind == "followed" else [not moved for moved in changed])


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(kind: str, tmp_path: Path, data: Path) -> None:
    masked.assert_an_interruption_changes_nothing(KINDS[kind], data, tmp_path, stop=3, every=2)


@pytest.mark.parametrize("kind", KINDS)
def test_settled_weights_are_those_that_it_computed_with(kind: str, tmp_path: Path, data: Path) -> None:
    model = factories.model()
    masks = KINDS[kind](model)
    masked.trained(model, masks, data, tmp_path, epochs=1.0)
    masks.eval()
    rounded = {path: weight.detach().clone() for path, weight in masks.round_weights(model).items()}
    table = model.get_input_embeddings().weight.detach().clone()
    masks.settle(model)
    for path, layer in linears(model).items():
        assert torch.equal(layer.weight, rounded[path])
        torch.testing.assert_close(masks.round_weights(model)[path], rounded[path], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(model.get_input_embeddings().weight, literal_weights(table))


# What was trained is what is stored


def one_step(masks: FakeQuantization, model: Any) -> float:
    """How far one step of one input of the last layer can move a logit."""
    ranges = masks.ranges()
    if ranges is None:
        return 1e-5
    path, head = list(linears(model).items())[-1]
    return scale_and_zero_point(*ranges.inputs[path])[0] * head.weight.abs().max().item()


def stored(backend: Any, model: Any, folder: Path, kind: str = "ema", head: str = "sequence") -> tuple[Any, Any]:
    """After three steps the float model's logits and the fake-quantized one's, once what was stored gave the latter."""
    auto = {"sequence": AUTO, "mask": "AutoModelForMaskedLM"}[head]
    (folder / "target").mkdir(parents=True)
    save_model(model, factories.tokenizer(), folder / "source")
    job = QuantizationJob(
        folder / "source", folder / "target", auto, make_dummy_inputs(folder / "source"), lambda _: batches()
    )
    masks = backend.training_overlay(model, job, kind, 0.5)
    optimizer = torch.optim.AdamW([*model.train().parameters(), *masks.train().parameters()], lr=1e-3)
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(model, masks, (step - 1) / 3, seed=step)
        optimizer.step()
        masks.after_step(model, step, 3)
    model.eval(), masks.eval()
    plain = logits_of(model, job.dummy_inputs)
    with masks.lay_over(model, 1.0):
        trained = logits_of(model, job.dummy_inputs)
    masks.settle(model)
    save_model(model, factories.tokenizer(), folder / "source")
    found = backend.quantize(replace(job, ranges=masks.ranges())).logits
    # Float kernels differ in the last bits, which is a whole step of what lies just between two.
    assert np.median(np.abs(found - trained)) <= 1e-5
    assert np.abs(found - trained).max() <= max(1e-5, one_step(masks, model) if head == "sequence" else math.inf)
    assert np.abs(found - trained).max() <= np.abs(plain - trained).max() / 2
    return plain, trained


STATIC = BACKENDS.parse({"use": "onnx_int8", "mode": "static"})
UNEVEN = [Keep((1, 3), tuple(range(5, 40))), Keep((), tuple(range(64)))]
INT8 = [
    ("bert", "ema", {}), ("bert", "learned", {}), ("albert", "ema", {}), ("distilbert", "learned", {}),
    ("deberta-v2", "ema", {}), ("bert", "ema", {"embedding_bits": 4}),
    ("bert", "ema", {"embeddings": False, "per_channel": False}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "kind", "options"), INT8)
def test_int8_logits_are_within_a_step_of_the_fake_quantized_models(
    family: str, kind: str, options: Any, tmp_path: Path
) -> None:
    stored(BACKENDS.parse({"use": "onnx_int8", "mode": "static", **options}), factories.model(family), tmp_path, kind)


@pytest.mark.parametrize("kind", ["ema", "learned"])
def test_so_are_those_of_a_pruned_model(kind: str, tmp_path: Path) -> None:
    stored(STATIC, cut(factories.model(), UNEVEN), tmp_path, kind)


def test_so_are_those_of_a_mask_head_whose_weights_are_the_words(tmp_path: Path) -> None:
    stored(STATIC, factories.model(head="mask"), tmp_path, head="mask")


@pytest.mark.parametrize("layout", ["stock", "uneven"])
def test_int4_logits_are_the_fake_quantized_models(layout: str, tmp_path: Path) -> None:
    model = factories.model() if layout == "stock" else cut(factories.model(), UNEVEN)
    plain, trained = stored(
        BACKENDS.parse({"use": "onnx_int4", "compute": "float32", "block_size": 16}), model, tmp_path
    )
    assert np.abs(plain - trained).max() > 1e-3


@pytest.mark.parametrize("kind", ["ema", "learned"])
def test_a_whole_stage_stores_what_it_trained(
    kind: str, tmp_path: Path, teacher: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "ranges": kind}
    stages = [{"kind": "quantize", "backend": {"use": "onnx_int8", "mode": "static", "rows": 16}, "train": train}]
    recipe = load(factories.recipe(tmp_path / "recipe.yaml", teacher, data, stages=stages)).recipe
    context = StageContext(recipe.task, recipe.seed, open_artifact(teacher), {}, tmp_path / "stage")
    made, backend = list[FakeQuantization](), BACKENDS.get("onnx_int8")
    original = backend.training_overlay
    monkeypatch.setattr(backend, "training_overlay", lambda *given: made.append(original(*given)) or made[-1])
    result = recipe.stages[0].run(open_artifact(teacher), context)
    model, masks = load_model(context.directory / "trained", AUTO), made[0].eval()
    with masks.lay_over(model, 1.0):
        trained = logits_of(model, make_dummy_inputs(context.model_directory))
    assert result.logits is not None
    assert np.abs(result.logits - trained).max() <= one_step(masks, model)
    before, after = (load_model(path, AUTO).state_dict() for path in (teacher, context.directory / "trained"))
    assert not torch.equal(before["classifier.weight"], after["classifier.weight"])
    assert result.facts["dev"] > 0.9


# However many processes there are


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_come_to_the_ranges_of_one(kind: str, tmp_path: Path, data: Path) -> None:
    masked.assert_two_processes_train_as_one(__name__, kind, KINDS[kind], data, tmp_path, epochs=1.0, atol=1e-4)
