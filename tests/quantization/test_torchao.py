"""torchao's int8 and int4: what it stores, that it reloads, and training that feels the rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from hfcompress.measure.verify import verify
from hfcompress.models.artifact import load_model, open_artifact, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import observe
from hfcompress.models.linears import layer_linears
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob, QuantizedModel
from hfcompress.utils.errors import HfcompressError
from tests import factories

pytest.importorskip("torchao")

AUTO = "AutoModelForSequenceClassification"
NAMES = ("torchao_int4", "torchao_int8", "torchao_int8_weight_only")
NEAR = {"torchao_int4": 0.4, "torchao_int8": 0.5, "torchao_int8_weight_only": 0.05}
OUT, QUERY = "bert.encoder.layer.1.output.dense", "bert.encoder.layer.0.attention.self.query"
UNEVEN = [Keep((1, 3), tuple(range(96))), Keep((), ())]
INT4 = BACKENDS.parse("torchao_int4")

Quantized = Callable[..., tuple[QuantizationJob, QuantizedModel]]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def make(name: str, uneven: bool = False, hidden: int = 64, keep: Any = frozenset()) -> Any:
        source, target = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp(name)
        model = factories.model(hidden=hidden, ffn=2 * hidden)
        save_model(cut(model, UNEVEN) if uneven else model, factories.tokenizer(), source)
        job = QuantizationJob(source, target, AUTO, make_dummy_inputs(source), keep=keep)
        return job, BACKENDS.parse(name).quantize(job)

    return make


def loaded(job: QuantizationJob) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(job.target, device_map="cpu").eval()


def relative(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_answers_like_the_float_model_and_reloads_through_stock_transformers(
    name: str, uneven: bool, quantized: Quantized
) -> None:
    job, made = quantized(name, uneven)
    plain, answers = load_model(job.source, AUTO), made.logits
    assert 0 < relative(answers, logits_of(plain, job.dummy_inputs)) <= NEAR[name]
    model = loaded(job)
    assert np.array_equal(logits_of(model, job.dummy_inputs), answers)
    rounded = {path for path, module in model.named_modules() if type(getattr(module, "weight", None)) not in _PLAIN}
    assert rounded == set(layer_linears(plain))


_PLAIN = (type(None), nn.Parameter)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_process_answers_the_same(name: str, uneven: bool, quantized: Quantized) -> None:
    job, made = quantized(name, uneven)
    differences = verify(open_artifact(job.target), made.logits, AUTO)
    assert set(differences) == {"transformers", *(["hfcompress"] if uneven else [])}
    assert set(differences.values()) == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_directory_says_what_it_holds_and_is_as_large_as_planned(name: str, quantized: Quantized) -> None:
    job, _ = quantized(name, hidden=256)
    artifact, source = open_artifact(job.target), open_artifact(job.source)
    assert source.shape is not None
    assert (artifact.dtype, artifact.runtime) == ("int4" if name == "torchao_int4" else "int8", "torch")
    assert artifact.shape == source.shape
    assert artifact.disk_bytes == pytest.approx(BACKENDS.parse(name).plan(source.shape).bytes, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_stays_as_it_was(name: str, quantized: Quantized) -> None:
    job, _ = quantized(name, keep=frozenset({QUERY}))
    model, plain = loaded(job), load_model(job.source, AUTO)
    assert torch.equal(model.get_submodule(QUERY).weight, plain.get_submodule(QUERY).weight)
    assert type(model.get_submodule(OUT).weight) is not nn.Parameter


@pytest.mark.parametrize(
    ("name", "group", "half"),
    [("torchao_int8", 64, 127.5), ("torchao_int8_weight_only", 64, 127.5), ("torchao_int4", 32, 7.5)],
)
def test_rounded_is_the_nearest_on_a_symmetric_grid(name: str, group: int, half: float) -> None:
    """The grid of a row (or group) is whole steps of `max |w| / 127.5` (7.5), zero on it, the ends cut by half one."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    rounded = BACKENDS.parse(name).fake_quantize(weight).reshape(4, -1, group)
    steps = weight.reshape(4, -1, group).abs().amax(-1, keepdim=True) / half
    whole = (rounded / steps).nan_to_num()
    assert torch.allclose(whole, whole.round(), atol=1e-3)
    assert whole.abs().max() <= half + 0.5 + 1e-3
    assert ((rounded - weight.reshape(4, -1, group)).abs() <= steps * 0.5001).all()
    assert (rounded[2] == 0).all()


def test_rounded_is_what_is_stored(quantized: Quantized) -> None:
    for name in NAMES:
        job, _ = quantized(name)
        stored: Any = loaded(job).get_submodule(OUT).weight
        plain = load_model(job.source, AUTO).get_submodule(OUT).weight
        assert torch.equal(stored.dequantize(), BACKENDS.parse(name).fake_quantize(plain))


@pytest.mark.parametrize("name", NAMES)
def test_odd_weights_are_noted_and_those_that_are_not_finite_refused(name: str, tmp_path: Path) -> None:
    model: Any = factories.model()
    with torch.no_grad():
        model.get_submodule(OUT).weight[3] = 0
        model.get_submodule(QUERY).weight[5, 7] = 1e6
    factories.save(model, tmp_path / "float")
    job = QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
    job.target.mkdir()
    made = BACKENDS.parse(name).quantize(job)
    assert np.isfinite(made.logits).all()
    assert made.odd_weights[1:] == (OddWeights(OUT, "zeros", 1),)
    assert made.odd_weights[0].layer == QUERY
    with torch.no_grad():
        model.get_submodule(QUERY).weight[5, 7] = float("nan")
    factories.save(model, tmp_path / "broken")
    with pytest.raises(HfcompressError, match=f"{QUERY} has weights that are NaN"):
        BACKENDS.parse(name).quantize(QuantizationJob(tmp_path / "broken", tmp_path / "none", AUTO, job.dummy_inputs))


def test_groups_that_do_not_divide_a_width_are_refused_before_and_when_it_runs(tmp_path: Path) -> None:
    model = cut(factories.model(hidden=64, ffn=128), [Keep((0, 1, 2, 3), tuple(range(100)))] * 2)
    save_model(model, factories.tokenizer(), tmp_path / "float")
    shape = open_artifact(tmp_path / "float").shape
    assert shape is not None
    assert INT4.problems(shape) == ["groups of 32 weights do not divide linear layers with 100 inputs"]
    with pytest.raises(HfcompressError, match=r"output\.dense has 100 inputs, which groups of 32 do not divide"):
        INT4.quantize(
            QuantizationJob(tmp_path / "float", tmp_path / "out", AUTO, make_dummy_inputs(tmp_path / "float"))
        )


# Training


def test_what_was_trained_is_stored_exactly(tmp_path: Path) -> None:
    model: Any = cut(factories.model(hidden=64, ffn=128), UNEVEN)
    names = set(model.state_dict())
    job = QuantizationJob(
        tmp_path / "trained", tmp_path / "out", AUTO, {n: t.numpy() for n, t in factories.batch().items()}
    )
    masks = INT4.training_overlay(model, job, "ema", 0.5)
    # A checkpoint of the model loads with or without torchao's modules.
    assert set(model.state_dict()) == names
    assert not masks.state_dict()
    optimizer = torch.optim.SGD([*model.parameters(), *masks.parameters()], lr=0.05)
    before = model.get_submodule(QUERY).weight.detach().clone()
    for step in range(2):
        model.train(), masks.train()
        with masks.lay_over(model, step / 2):
            observe(model, factories.batch()).logits.square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
        masks.after_step(model, step + 1, 2)
    assert not torch.equal(model.get_submodule(QUERY).weight, before)
    masks.eval()
    with masks.lay_over(model, 1.0):
        felt = logits_of(model, job.dummy_inputs)
    masks.settle(model)
    assert {type(layer) for layer in layer_linears(model).values()} == {nn.Linear}
    assert relative(logits_of(model, job.dummy_inputs), felt) > 1e-3
    save_model(model, factories.tokenizer(), job.source)
    job.target.mkdir()
    assert np.array_equal(INT4.quantize(job).logits, felt)
    assert masks.ranges() is None


def test_padding_changes_no_answer_in_training(tmp_path: Path) -> None:
    model = factories.model()
    INT4.training_overlay(model, QuantizationJob(tmp_path, tmp_path, AUTO, {}), "ema", 0.5)
    batch = {name: tensor.numpy() for name, tensor in factories.batch().items()}
    together = logits_of(model, batch)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = logits_of(model, {name: value[row : row + 1, :length] for name, value in batch.items()})
        assert np.allclose(alone[0], together[row], atol=1e-5)
