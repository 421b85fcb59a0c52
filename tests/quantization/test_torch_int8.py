"""int8 in plain torch: the arithmetic, what lies on disk, and that it loads wherever hfcompress was imported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hfcompress.measure.verify import verify
from hfcompress.models.architectures import TASK_HEADS
from hfcompress.models.artifact import load_model, open_artifact, read_config, save_model
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.factorized_embeddings import factor_embeddings
from hfcompress.models.odd_weights import OddWeights
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.int8_modules import Int8Embedding, Int8Linear, put_int8_layers
from hfcompress.utils.errors import HfcompressError
from tests import factories

AUTO = "AutoModelForSequenceClassification"
UNEVEN = [Keep((1, 3), tuple(range(100))), Keep((), ())]
QUERY, OUT = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"
LEVELS = 255 if torch.cpu._is_vnni_supported() else 127
BACKEND = BACKENDS.parse("torch_int8")
NEAR = 0.15
"""Of the largest logit: how far rounding may move an answer of these random models."""

Quantized = Callable[..., QuantizationJob]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """Quantizes a tiny model, once for equal arguments."""

    @cache
    def make(family: str = "bert", head: str = "sequence", uneven: bool = False, **options: Any) -> QuantizationJob:
        source, target = tmp_path_factory.mktemp("float"), tmp_path_factory.mktemp("int8")
        model = factories.model(family, hidden=64, ffn=128, head=head)
        save_model(cut(model, UNEVEN) if uneven else model, factories.tokenizer(), source)
        job = QuantizationJob(source, target, "AutoModel" + TASK_HEADS[head], make_dummy_inputs(source))
        BACKENDS.parse({"use": "torch_int8", **options}).quantize(job)
        factories.tokenizer().save_pretrained(target)
        return job

    return make


def stored(path: Path) -> dict[str, str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping


def loaded(job: QuantizationJob) -> Any:
    return getattr(transformers, job.auto_class).from_pretrained(job.target).eval()


def relative(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def changed(tmp_path: Path, change: Callable[[Any], None]) -> QuantizationJob:
    """A model with a change to its weights, and what is to be made of it."""
    model = factories.model()
    with torch.no_grad():
        change(model)
    factories.save(model, tmp_path / "float")
    (tmp_path / "int8").mkdir()
    return QuantizationJob(tmp_path / "float", tmp_path / "int8", AUTO, make_dummy_inputs(tmp_path / "float"))


def linear(rows: int = 5, columns: int = 8, seed: int = 0) -> tuple[nn.Linear, Int8Linear]:
    torch.manual_seed(seed)
    plain = nn.Linear(columns, rows)
    made = Int8Linear(columns, rows, True, torch.device("cpu"))
    made.quantize(plain.weight)
    made.bias = plain.bias
    return plain, made


# The arithmetic


def literal_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's whole numbers, and its scale `max |w| / 127`."""
    scales = table.detach().abs().amax(1) / 127
    scales[scales == 0] = 1
    return (table.detach() / scales[:, None]).round(), scales


@torch.no_grad()
def literal(inputs: Tensor, layer: nn.Linear) -> Tensor:
    """`y_i = s_x s_i Σ_j (q_j - z) w_ij + b_i` in whole numbers, with the grid of all inputs together."""
    low, high = min(inputs.min().item(), 0.0), max(inputs.max().item(), 0.0)
    step = (high - low) / LEVELS
    zero = round(-low / step)
    numbers = ((inputs / step).round() + zero).clamp(0, LEVELS) - zero
    weights, scales = literal_rows(layer.weight)
    return (numbers.double() @ weights.double().T * step * scales + layer.bias).float()


def test_a_linear_layer_multiplies_whole_numbers() -> None:
    plain, made = linear(24, 48)
    inputs = torch.randn(2, 7, 48) * 3 + 1
    found = made(inputs)
    assert torch.allclose(found, literal(inputs, plain), atol=1e-4)
    assert (found - plain(inputs)).abs().max() > 1e-3


def test_an_embedding_gathers_and_scales_and_never_makes_the_table_floats() -> None:
    table, made = nn.Embedding(1000, 16), Int8Embedding(1000, 16, None, torch.device("cpu"))
    made.quantize(table.weight)
    ids = torch.tensor([[3, 999, 0], [7, 7, 1]])
    numbers, scales = literal_rows(table.weight)
    largest = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if result.is_floating_point() else 0)
            return result

    with Watched():
        found = made(ids)
    assert torch.equal(found, numbers[ids] * scales[ids][..., None])
    assert max(largest) == 6 * 16


def test_rounded_is_what_is_stored() -> None:
    plain, made = linear()
    assert torch.equal(BACKEND.fake_quantize(plain.weight), made.codes * made.weight_scale[:, None])
    assert made.codes.abs().amax(1).eq(127).all()


@pytest.mark.parametrize("engine", [True, False])
def test_without_an_engine_or_in_half_precision_the_rounded_weights_are_multiplied(
    engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = linear()
    inputs = torch.randn(3, 8)
    expected = nn.functional.linear(inputs, BACKEND.fake_quantize(plain.weight), plain.bias)
    if engine:
        assert torch.allclose(made.bfloat16()(inputs.bfloat16()).float(), expected, atol=0.05)
    else:
        monkeypatch.setattr(type(torch.backends.quantized), "engine", "none")
        assert torch.allclose(made(inputs), expected, atol=1e-6)


def test_a_layer_follows_new_weights_and_can_be_copied() -> None:
    inputs = torch.randn(3, 8)
    (_, made), (_, other) = linear(seed=0), linear(seed=1)
    before = made(inputs)
    assert torch.equal(copy.deepcopy(made)(inputs), before)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(inputs), other(inputs))
    assert not torch.equal(made(inputs), before)


# What is made


HEADED = [
    pytest.param(family, head, marks=() if head == "sequence" or family == "bert" else pytest.mark.slow)
    for family, head in factories.headed()
]


@pytest.mark.parametrize(("family", "head"), HEADED)
def test_every_family_and_head_reloads_and_saves_again_exactly(
    family: str, head: str, quantized: Quantized, tmp_path: Path
) -> None:
    job = quantized(family, head)
    plain = logits_of(load_model(job.source, job.auto_class), job.dummy_inputs)
    model = loaded(job)
    answers = logits_of(model, job.dummy_inputs)
    assert 0 < relative(answers, plain) <= NEAR
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(job.target)
    again = getattr(transformers, job.auto_class).from_pretrained(tmp_path)
    assert np.array_equal(logits_of(again, job.dummy_inputs), answers)


@pytest.mark.parametrize("uneven", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_fresh_process_answers_the_same_after_one_import(uneven: bool, quantized: Quantized) -> None:
    job = quantized(uneven=uneven)
    expected = logits_of(loaded(job), job.dummy_inputs)
    assert verify(open_artifact(job.target), expected, AUTO) == {"hfcompress": 0.0}
    assert 0 < relative(expected, logits_of(load_model(job.source, AUTO), job.dummy_inputs)) <= NEAR


@pytest.mark.parametrize("uneven", [True, False])
def test_without_the_import_it_is_refused(uneven: bool, quantized: Quantized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers read as weights would be a model that answers, wrongly."""
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "hfcompress_int8")
    with pytest.raises(RuntimeError, match="mismatched"):
        loaded(quantized(uneven=uneven))


def test_the_directory_says_what_it_holds(quantized: Quantized) -> None:
    job = quantized(uneven=True)
    artifact = open_artifact(job.target)
    assert (artifact.dtype, artifact.runtime) == ("int8", "torch")
    assert artifact.shape == open_artifact(job.source).shape
    says = {"quant_method": "hfcompress_int8", "embeddings": True, "keep": []}
    assert read_config(job.target)["quantization_config"] == says


def test_every_matrix_is_int8_and_the_plan_s_bytes_are_those_on_disk(tmp_path: Path) -> None:
    source = factories.save(factories.model(hidden=256, ffn=512), tmp_path / "float")
    (tmp_path / "int8").mkdir()
    BACKEND.quantize(QuantizationJob(source, tmp_path / "int8", AUTO, make_dummy_inputs(source)))
    made, plain = open_artifact(tmp_path / "int8"), open_artifact(source)
    assert plain.shape is not None
    assert made.disk_bytes == pytest.approx(BACKEND.plan(plain.shape).bytes, rel=0.1)
    assert made.disk_bytes <= 0.3 * plain.disk_bytes
    with safe_open(made.path / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(n).get_dtype() for n in file.keys() if len(file.get_slice(n).get_shape()) > 1}  # noqa: SIM118
    assert kinds == {"I8"}


def test_words_are_predicted_with_the_table_that_is_gathered_from(quantized: Quantized) -> None:
    job = quantized("bert", "mask")
    model = loaded(job)
    words, decoder = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(decoder, Int8Linear)
    assert decoder.weight is words.weight
    assert torch.equal(decoder.weight_scale, words.weight_scale)
    assert [n for n in stored(job.target) if "decoder.weight" in n] == ["cls.predictions.decoder.weight_scale"]


@pytest.mark.parametrize("head", ["sequence", "mask"])
def test_embeddings_can_stay_in_float_and_what_shares_them_too(head: str, quantized: Quantized) -> None:
    kinds = stored(quantized("bert", head, embeddings=False).target)
    assert kinds["bert.embeddings.word_embeddings.weight"] == "F32"
    assert kinds[f"{OUT}.weight"] == "I8"
    assert not [name for name in kinds if "decoder" in name and name.endswith("weight_scale")]
    assert "bert.embeddings.word_embeddings.weight_scale" not in kinds


def test_a_decoder_s_own_output_layer_is_int8_and_planned(tmp_path: Path) -> None:
    words = 2000
    model = factories.model("llama", head="causal", tie_word_embeddings=False, vocab_size=words, hidden=64)
    source = factories.save(model, tmp_path / "float")
    (tmp_path / "int8").mkdir()
    BACKEND.quantize(QuantizationJob(source, tmp_path / "int8", "AutoModelForCausalLM", make_dummy_inputs(source)))
    assert stored(tmp_path / "int8")["lm_head.weight"] == "I8"
    shape = open_artifact(source).shape
    assert shape is not None
    assert open_artifact(tmp_path / "int8").disk_bytes == pytest.approx(BACKEND.plan(shape).bytes, rel=0.1)


def test_factored_word_embeddings_are_int8_in_both_parts(tmp_path: Path) -> None:
    model, _ = factor_embeddings(factories.model(), 8, torch.ones(len(factories.WORDS), dtype=torch.long))
    save_model(model, factories.tokenizer(), tmp_path / "float")
    job = QuantizationJob(tmp_path / "float", tmp_path / "int8", AUTO, make_dummy_inputs(tmp_path / "float"))
    job.target.mkdir()
    made = BACKEND.quantize(job)
    words = loaded(job).get_input_embeddings()
    assert (type(words.table), type(words.projection)) == (Int8Embedding, Int8Linear)
    assert np.array_equal(logits_of(loaded(job), job.dummy_inputs), made.logits)


def test_what_is_kept_stays_as_it_was_with_and_without_the_head(tmp_path: Path) -> None:
    job = changed(tmp_path, lambda model: None)
    BACKEND.quantize(
        QuantizationJob(job.source, job.target, AUTO, job.dummy_inputs, keep=frozenset({QUERY, "classifier"}))
    )
    plain, model = load_model(job.source, AUTO), loaded(job)
    for path in (QUERY, "classifier"):
        assert torch.equal(model.get_submodule(path).weight, plain.get_submodule(path).weight)
        assert type(model.get_submodule(path)) is nn.Linear
    assert isinstance(model.get_submodule(OUT), Int8Linear)
    base = transformers.AutoModel.from_pretrained(job.target)
    assert type(base.get_submodule(QUERY.removeprefix("bert."))) is nn.Linear
    assert isinstance(base.get_submodule(OUT.removeprefix("bert.")), Int8Linear)


def test_tables_that_other_code_reads_stay_in_float(quantized: Quantized) -> None:
    for family, path in (
        ("deberta-v2", "deberta.encoder.rel_embeddings"),
        ("mpnet", "mpnet.encoder.relative_attention_bias"),
    ):
        assert read_config(quantized(family).target)["quantization_config"]["keep"] == [path]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_padding_moves_an_answer_by_no_more_than_rounding(family: str, quantized: Quantized) -> None:
    """The grid of a layer's inputs spans the batch, padding included: a row alone gets another grid."""
    job = quantized(family)
    model, probe = loaded(job), {n: t.numpy() for n, t in factories.batch(4, 20).items()}
    together, plain = logits_of(model, probe), logits_of(load_model(job.source, AUTO), probe)
    for row, length in enumerate(probe["attention_mask"].sum(1)):
        alone = logits_of(model, {name: value[row : row + 1, :length] for name, value in probe.items()})
        assert np.abs(alone[0] - together[row]).max() <= NEAR / 2 * np.abs(plain).max()


# Odd weights


def test_a_channel_of_zeros_gives_its_bias_and_is_noted(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.get_submodule(OUT).weight[3] = 0

    job = changed(tmp_path, change)
    (odd,) = BACKEND.quantize(job).odd_weights
    layer: Any = loaded(job).get_submodule(OUT)
    assert torch.equal(layer(torch.randn(4, 64))[:, 3], layer.bias[3].expand(4))
    assert odd == OddWeights(OUT, "zeros", 1)


def test_an_outlier_costs_its_own_channel_alone_and_is_noted(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.get_submodule(OUT).weight[3, 5] = 1e6

    job = changed(tmp_path, change)
    made = BACKEND.quantize(job)
    layer, plain = loaded(job).get_submodule(OUT), factories.model().get_submodule(OUT)
    others = [row for row in range(32) if row != 3]
    assert torch.equal(layer.codes[others].float(), literal_rows(plain.weight)[0][others])
    assert layer.codes[3].tolist() == [127 if column == 5 else 0 for column in range(64)]
    assert np.isfinite(made.logits).all()
    assert made.odd_weights == (OddWeights(OUT, "outlier", 1),)


@pytest.mark.parametrize("path", [OUT, "bert.embeddings.word_embeddings"])
def test_weights_that_are_not_finite_are_refused_by_name(path: str, tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.get_submodule(path).weight[3, 5] = float("nan")

    job = changed(tmp_path, change)
    with pytest.raises(HfcompressError, match=f"{path} has .* that are NaN or infinite"):
        BACKEND.quantize(job)
    assert list(job.target.iterdir()) == []


def test_a_kept_layer_may_be_odd(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.get_submodule(OUT).weight[3] = 0

    job = changed(tmp_path, change)
    assert BACKEND.quantize(replace(job, keep=frozenset({OUT}))).odd_weights == ()


def test_layers_without_weights_are_left_alone(quantized: Quantized) -> None:
    model = factories.model(hidden=64, ffn=128)
    model = cut(model, UNEVEN)
    put_int8_layers(model, embeddings=True, keep=())
    layer = model.get_submodule(OUT)
    assert not isinstance(layer, Int8Linear)
    assert layer.in_features == 0
