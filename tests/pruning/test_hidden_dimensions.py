"""Dimensions of the residual stream and whole layers, cut out: the result answers as the gated model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS, layers_of, unit_counts
from hfcompress.models.artifact import load_model, save_weights
from hfcompress.models.forward import observe
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.hidden_dimensions import cut_hidden
from hfcompress.pruning.layer_dropping import drop_layers, find_required_layers
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.hidden_gates import apply_hidden_gates

ENCODERS = [name for name in ARCHITECTURES if name not in ("llama", "qwen2", "qwen3")]
DECODERS = [name for name in ARCHITECTURES if name not in ENCODERS]
KINDS = [(f, h) for f in ENCODERS for h in TASK_HEADS if h != "causal"] + [
    (f, h) for f in DECODERS for h in TASK_HEADS if h != "mask"
]
DIMS = (0, 1, 3, 4, 6, 7, 9, 10, 11, 12, 14, 17, 18, 20, 22, 23, 25, 26, 27, 29, 30)
THREE_QUARTERS = (*DIMS, 28, 31, 13)


def logits(model: Any, inputs: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return observe(model, inputs or factories.batch()).logits


def gated_logits(model: Any, dims: Any) -> torch.Tensor:
    with apply_hidden_gates(model, dims):
        return logits(model)


@pytest.mark.parametrize(("family", "head"), KINDS)
def test_cutting_dimensions_equals_gating_them(family: str, head: str) -> None:
    model = factories.model(family, head=head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    small = cut_hidden(model, DIMS)

    expected = gated_logits(model, DIMS)
    assert torch.allclose(logits(small), expected, atol=1e-5)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    shape = shape_of(small.config.to_dict(), head=head)
    assert shape.hidden == len(DIMS)
    assert sum(p.numel() for p in small.parameters()) == shape.parameters
    assert unit_counts(small) == unit_counts(model)


def test_words_that_are_tied_stay_tied() -> None:
    model = factories.model("llama", head="causal", tie_word_embeddings=True)
    small = cut_hidden(model, DIMS)
    assert torch.allclose(logits(small), gated_logits(model, DIMS), atol=1e-5)
    assert small.lm_head.weight is small.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gated_norms_are_those_of_the_paper_over_the_dimensions_that_stay(family: str) -> None:
    model, batch = factories.model(family), factories.batch()
    kept = list(DIMS)
    embeddings = model.base_model.embeddings
    norm = embeddings.norm if family == "modernbert" else embeddings.LayerNorm
    with torch.no_grad():
        words = model.get_input_embeddings()(batch["input_ids"])
        if family == "bert":
            words = words + embeddings.position_embeddings.weight[:12] + embeddings.token_type_embeddings.weight[0]
        stream = words[..., kept]
        centred = stream - stream.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight[kept]
        expected = torch.zeros_like(words)
        expected[..., kept] = normed if norm.bias is None else normed + norm.bias[kept]
    with apply_hidden_gates(model, DIMS), torch.no_grad():
        seen = observe(model, batch, frozenset({"hidden_states"})).hidden_states[0]
    assert torch.allclose(seen, expected, atol=1e-5)


def test_a_gated_root_mean_square_is_taken_over_the_dimensions_that_stay() -> None:
    model, batch, kept = factories.model("llama", layers=1), factories.batch(), list(DIMS)
    norm, seen = model.model.layers[0].input_layernorm, []
    with apply_hidden_gates(model, DIMS), torch.no_grad():
        norm.register_forward_hook(lambda _m, _i, output: seen.append(output))
        model(**batch)
    stream = model.model.embed_tokens.weight.detach()[batch["input_ids"]][..., kept]
    scale = (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    assert torch.allclose(seen[0][..., kept], stream * scale * norm.weight[kept], atol=1e-5)
    assert seen[0].abs().sum(dim=(0, 1)).count_nonzero() == len(DIMS)


def test_by_default_the_heads_outputs_with_the_largest_weights_behind_them_stay() -> None:
    model = factories.model()
    with torch.no_grad():
        model.classifier.weight *= 0.01
        model.classifier.weight[:, [*DIMS[5:], 2, 5, 8, 13, 15]] = 1.0
    wanted = sorted([*DIMS[5:], 2, 5, 8, 13, 15])
    small = cut_hidden(model, DIMS)
    assert torch.equal(small.classifier.weight, model.classifier.weight[:, wanted])
    assert torch.equal(small.bert.pooler.dense.bias, model.bert.pooler.dense.bias[wanted])
    assert torch.equal(small.bert.pooler.dense.weight, model.bert.pooler.dense.weight[wanted][:, list(DIMS)])


def test_heads_cut_in_proportion_give_the_stock_class_again() -> None:
    model, dims = factories.model(), sorted(THREE_QUARTERS)
    narrow = cut_hidden(model, dims)
    assert type(narrow).__name__ == "PrunedBertForSequenceClassification"
    small = cut(narrow, [Keep((0, 1, 3), tuple(range(64)))] * 2)
    assert type(small) is type(model)
    assert small.config.to_dict()["num_attention_heads"] == 3


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_the_order_of_cuts_does_not_matter(family: str, tmp_path: Path) -> None:
    model = factories.model(family, layers=3)
    groups = unit_counts(model)[0]
    keep = [Keep((0,) if n else tuple(range(g)), tuple(range(n, 48))) for n, g in enumerate(groups)]
    shared = len(keep) == 1

    def units(m: Any, which: Any) -> Any:
        return cut(m, keep if shared else [keep[i] for i in which])

    first = drop_layers(units(cut_hidden(model, DIMS), (0, 1, 2)), (0, 2))
    second = units(cut_hidden(drop_layers(model, (0, 2)), DIMS), (0, 2))
    third = cut_hidden(drop_layers(units(model, (0, 1, 2)), (0, 2)), DIMS)
    for other in (second, third):
        assert torch.allclose(logits(first), logits(other), atol=1e-5)
        assert first.config.to_dict().get("per_layer_config") == other.config.to_dict().get("per_layer_config")
    save_weights(first, tmp_path)
    again = load_model(tmp_path, "AutoModelForSequenceClassification")
    assert torch.equal(logits(again), logits(first))


@pytest.mark.parametrize("family", [f for f in ARCHITECTURES if f != "albert"])
def test_a_dropped_layer_is_as_if_its_blocks_passed_everything_on(family: str) -> None:
    model, kept, passed = factories.model(family, layers=4), (0, 2), []
    small, whole, stack = drop_layers(model, kept), logits(model), layers_of(model)

    def pass_on(_module: Any, inputs: Any, kwargs: Any, output: Any) -> Any:
        stream = inputs[0] if inputs else kwargs["hidden_states"]
        passed.append(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    for layer in [layer for index, layer in enumerate(stack) if index not in kept]:
        layer.register_forward_hook(pass_on, with_kwargs=True)
    assert torch.allclose(logits(small), logits(model), atol=1e-5)
    assert not torch.allclose(logits(small), whole, atol=1e-3)
    assert len(passed) == 2


def test_the_shared_layer_runs_as_often_as_layers_are_kept() -> None:
    model = factories.model("albert", layers=4)
    small = drop_layers(model, (1, 3))
    model.config.num_hidden_layers = 2
    assert torch.allclose(logits(small), logits(model), atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters())


def test_an_uneven_model_keeps_the_sizes_of_the_layers_that_stay() -> None:
    model = factories.model(layers=3)
    sizes = [((0,), 8), ((0, 2, 3), 40), ((1, 2), 16)]
    uneven = cut(model, [Keep(heads, tuple(range(ffn))) for heads, ffn in sizes])
    small = drop_layers(uneven, (1, 2))
    assert [(x.heads, x.ffn) for x in shape_of(small.config.to_dict()).layers] == [(3, 40), (2, 16)]
    assert torch.equal(small.bert.encoder.layer[0].intermediate.dense.weight,
                       uneven.bert.encoder.layer[1].intermediate.dense.weight)  # fmt: skip


def test_modernberts_layers_keep_their_kind_of_attention() -> None:
    model = factories.model("modernbert", layers=6)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None:
        pytest.skip("transformers before 5 counts the layers")
    small = drop_layers(model, (0, 2, 3, 5))
    assert small.config.layer_types == [kinds[i] for i in (0, 2, 3, 5)]
    assert [layer.attention_type for layer in small.model.layers] == small.config.layer_types


def test_modernberts_layers_are_refused_where_only_their_place_tells_their_kind() -> None:
    model = factories.model("modernbert", layers=6)
    model.config.layer_types, model.config.global_attn_every_n_layers = None, 3
    with pytest.raises(HfcompressError, match="one layer in 3 of modernbert"):
        drop_layers(model, (0, 3))


def test_modernberts_first_layer_must_stay() -> None:
    model = factories.model("modernbert")
    assert find_required_layers(shape_of(model.config.to_dict())) == (0,)
    assert find_required_layers(shape_of(factories.model().config.to_dict())) == ()
    with pytest.raises(HfcompressError, match="layer 1 of modernbert must stay"):
        drop_layers(model, (1,))


@pytest.mark.parametrize("family", ["electra", "deberta-v2"])
def test_a_stream_as_wide_as_the_embeddings_is_refused(family: str) -> None:
    model = factories.model(family, embedding_size=21)
    with pytest.raises(HfcompressError, match="a hidden width of 21 is the width of the embeddings"):
        cut_hidden(model, DIMS)


@pytest.mark.parametrize("kept", [(), (1, 0), (0, 0), (-1, 0), (0, 32)])
def test_what_stays_must_be_there_and_in_order(kept: tuple[int, ...]) -> None:
    model = factories.model()
    for refused in (cut_hidden, drop_layers):
        with pytest.raises(ValueError, match="ascending"):
            refused(model, kept)


def test_modes_and_settings_stay() -> None:
    model = factories.model(labels=3, hidden_act="relu", attn_implementation="eager").train()
    for small in (cut_hidden(model, DIMS), drop_layers(model, (1,))):
        assert small.training
        assert (small.config.hidden_act, small.config.num_labels) == ("relu", 3)
        assert small.config._attn_implementation == "eager"


def test_gates_leave_no_trace_even_where_the_pass_fails() -> None:
    model = factories.model()
    plain = logits(model)
    with pytest.raises(RuntimeError, match="inside"), apply_hidden_gates(model, DIMS):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), plain)
