"""What every architecture shows, under every kind of head, held against its own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of
from hfcompress.models.artifact import open_artifact
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import Observation, observe, select_inputs
from tests import factories

EVERY = frozenset({"hidden_states", "queries", "keys", "values"})
LAYERS, HIDDEN, ATTENTION_HEADS, LENGTH = 3, 24, 3, 12
NAMES = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "xlm-roberta": ("query", "key", "value"),
    "electra": ("query", "key", "value"),
    "albert": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "mpnet": ("q", "k", "v"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    **dict.fromkeys(("llama", "qwen2", "qwen3"), ("q_proj", "k_proj", "v_proj")),
}
"""What the linear layers are called; ModernBERT has one for all three."""
families = pytest.mark.parametrize("family", sorted(ARCHITECTURES))
headed = pytest.mark.parametrize(("family", "head"), factories.headed())
implementations = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def build(family: str, head: str = "sequence", attention: str = "sdpa", **config: Any) -> Any:
    built = factories.model(
        family, layers=LAYERS, hidden=HIDDEN, heads=ATTENTION_HEADS, ffn=40, labels=2 if head == "span" else 3,
        head=head, **config,
    )  # fmt: skip
    if attention == "eager" or built._supports_sdpa:
        built.set_attn_implementation(attention)
    return built


def see(
    built: Any, needs: frozenset[str] = EVERY, layers: frozenset[int] | None = None, **changes: Tensor
) -> Observation:
    with torch.inference_mode():
        return observe(built, factories.batch(length=LENGTH) | changes, needs, layers)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


def linears(built: Any, family: str, layer: int) -> list[tuple[Tensor, Tensor | float]]:
    """Weights and biases of query, key and value, found by their names in the class and not by our paths."""
    runs = LAYERS if family != "albert" else 1
    modules = [m for n, m in built.named_modules() if isinstance(m, nn.Linear)]
    if family == "modernbert":
        whole = [m.weight for m in modules if m.out_features == 3 * HIDDEN]
        assert len(whole) == runs
        return [(part, 0.0) for part in whole[layer - 1].split(HIDDEN)]
    found = []
    for name in NAMES[family]:
        named = [m for n, m in built.named_modules() if n.rpartition(".")[2] == name and isinstance(m, nn.Linear)]
        assert len(named) == runs
        module = named[(layer - 1) % runs]
        found.append((module.weight, 0.0 if module.bias is None else module.bias))
    return found


def into_layer(built: Any, family: str, layer: int, hidden: Tensor) -> Tensor:
    """What the projections read: the state before the layer, normed first by decoders and ModernBERT."""
    if ARCHITECTURES[family].decoder:
        return built.model.layers[layer - 1].input_layernorm(hidden)
    return built.model.layers[layer - 1].attn_norm(hidden) if family == "modernbert" else hidden


@implementations
@headed
def test_logits_and_hidden_states_of_every_head(family: str, head: str, attention: str) -> None:
    built = build(family, head, attention)
    seen, inputs = see(built), factories.batch(length=LENGTH)
    rows = len(inputs["input_ids"])
    with torch.inference_mode():
        output = built(**select_inputs(built, inputs))
    if head == "span":
        assert seen.logits.shape == (rows, LENGTH, 2)
        assert close(seen.logits[..., 0], output.start_logits)
        assert close(seen.logits[..., 1], output.end_logits)
    else:
        outputs = {"sequence": (3,), "token": (LENGTH, 3)}.get(head, (LENGTH, len(factories.WORDS)))
        assert seen.logits.shape == (rows, *outputs)
        assert close(seen.logits, output.logits)
    assert [tuple(state.shape) for state in seen.hidden_states] == [(rows, LENGTH, HIDDEN)] * (LAYERS + 1)


@implementations
@families
def test_projections_are_those_of_the_state_before_each_layer(family: str, attention: str) -> None:
    built = build(family, attention=attention)
    seen = see(built)
    assert list(seen.queries) == list(seen.keys) == list(seen.values) == [1, 2, 3]
    for layer in seen.queries:
        with torch.inference_mode():
            state = into_layer(built, family, layer, seen.hidden_states[layer - 1])
            for caught, (weight, bias) in zip(
                (seen.queries, seen.keys, seen.values), linears(built, family, layer), strict=True
            ):
                expected = (state @ weight.T + bias).unflatten(-1, (-1, HIDDEN // ATTENTION_HEADS)).transpose(1, 2)
                assert close(caught[layer], expected)


@pytest.mark.parametrize("family", [name for name, spec in ARCHITECTURES.items() if spec.plain_attention])
def test_plain_attention_is_the_softmax_of_what_is_caught(family: str) -> None:
    built = build(family, attention="eager")
    inputs = factories.batch(length=LENGTH)
    with torch.inference_mode():
        attentions = built(**select_inputs(built, inputs), output_attentions=True).attentions
    assert ours(see(built), inputs["attention_mask"], attentions)


@pytest.mark.parametrize("family", [name for name, spec in ARCHITECTURES.items() if not spec.plain_attention])
def test_where_attention_is_not_plain_what_is_caught_does_not_make_it(family: str) -> None:
    built = build(family, attention="eager", **({"local_attention": 64} if family == "modernbert" else {}))
    inputs = factories.batch(length=LENGTH)
    with torch.inference_mode():
        attentions = built(**select_inputs(built, inputs), output_attentions=True).attentions
    assert not ours(see(built), inputs["attention_mask"], attentions)


def ours(seen: Observation, mask: Tensor, attentions: tuple[Tensor, ...]) -> bool:
    """Whether `softmax(Q Kᵀ / √d)` over real tokens is the model's own attention, for the queries that are real."""
    real = mask.bool()
    for layer, attention in enumerate(attentions, start=1):
        scores = seen.queries[layer] @ seen.keys[layer].transpose(-1, -2) / (HIDDEN // ATTENTION_HEADS) ** 0.5
        made = scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1)
        if not all(close(a[:, row], b[:, row]) for a, b, row in zip(made, attention, real, strict=True)):
            return False
    return True


@implementations
@headed
def test_a_longer_pad_changes_nothing(family: str, head: str, attention: str) -> None:
    built, inputs = build(family, head, attention), factories.batch(length=LENGTH)
    padded = {name: nn.functional.pad(value, (0, 7)) for name, value in inputs.items()}
    seen, longer = see(built), see(built, **padded)
    real = inputs["attention_mask"].bool()
    for one, other in zip(seen.hidden_states, longer.hidden_states, strict=True):
        assert close(one[real], other[:, :LENGTH][real])
    for projection in ("queries", "keys", "values"):
        for layer, caught in getattr(seen, projection).items():
            more = getattr(longer, projection)[layer][:, :, :LENGTH]
            assert close(caught.transpose(1, 2)[real], more.transpose(1, 2)[real])
    if head == "sequence":
        assert close(seen.logits, longer.logits)
    else:
        assert close(seen.logits[real], longer.logits[:, :LENGTH][real])


@families
def test_only_the_layers_and_projections_that_are_asked_for_are_kept(family: str) -> None:
    built = build(family)
    whole, seen = see(built), see(built, frozenset({"keys"}), frozenset({2}))
    assert (seen.hidden_states, dict(seen.queries), dict(seen.values)) == ((), {}, {})
    assert list(seen.keys) == [2]
    assert close(seen.keys[2], whole.keys[2])


@families
def test_nothing_stays_hooked_and_what_is_caught_carries_gradients(family: str) -> None:
    built = build(family)
    seen = observe(built, factories.batch(length=LENGTH), EVERY)
    assert not any(m._forward_pre_hooks for m in built.modules())
    stack = layers_of(built)
    last = max(seen.queries)
    (seen.queries[last].sum() + seen.hidden_states[0].sum()).backward()
    weight = stack[-1].get_submodule(spec_of(built).modules.query).weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@families
def test_a_stack_is_the_layers_whose_weights_there_are(family: str) -> None:
    built, parts = build(family), ARCHITECTURES[family].modules
    stack = layers_of(built)
    assert len(stack) == (1 if family == "albert" else LAYERS)
    assert layers_of(built.base_model) == stack
    gated = 2 if family == "modernbert" else 1
    for layer in stack:
        assert layer.get_submodule(parts.attention_output).weight.shape == (HIDDEN, HIDDEN)
        assert layer.get_submodule(parts.ffn_in).weight.shape == (40 * gated, HIDDEN)
        assert layer.get_submodule(parts.ffn_out).weight.shape == (HIDDEN, 40)


@headed
def test_head_modules_hold_what_is_neither_embeddings_nor_layers(family: str, head: str) -> None:
    built = build(family, head)
    base, prefix = built.base_model, f"{built.base_model_prefix}."
    within = {f"{prefix}{name}" for name, _ in base.named_parameters() if "pooler" not in name.split(".")}
    named = [
        name for name in ARCHITECTURES[family].modules.task_heads[head] if hasattr(built, name) or hasattr(base, name)
    ]
    owned = [getattr(built, name, None) or getattr(base, name) for name in named]
    theirs = {id(parameter) for module in owned for parameter in module.parameters()}
    outside = {name: p for name, p in built.named_parameters(remove_duplicate=False) if name not in within}
    assert {id(p) for name, p in outside.items()} == theirs
    for name in named:  # each has its share
        rest = [m for other, m in zip(named, owned, strict=True) if other != name]
        assert theirs != {id(p) for module in rest for p in module.parameters()}


@headed
def test_a_saved_model_opens_and_answers_its_probe(family: str, head: str, tmp_path: Path) -> None:
    built = build(family, head)
    built.save_pretrained(tmp_path)
    shape = open_artifact(tmp_path).shape
    assert shape is not None
    assert (shape.architecture, shape.head, shape.parameters) == (family, head, built.num_parameters())
    probe = make_dummy_inputs(tmp_path, length=1000)
    assert probe["input_ids"].shape[1] == shape.usable_positions
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(value) for name, value in probe.items()}
        assert torch.equal(torch.from_numpy(logits_of(built, probe)), observe(built, inputs).logits)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "mpnet"])
def test_a_probe_as_long_as_the_positions_allow_fits_with_the_published_padding(family: str, tmp_path: Path) -> None:
    """Their first token stands at position 2, so one token more would be outside of the table."""
    built = build(family, pad_token_id=1)
    built.save_pretrained(tmp_path)
    probe = make_dummy_inputs(tmp_path, rows=2, length=1000)
    assert probe["input_ids"].shape[1] == 38
    assert (probe["input_ids"] == 1).sum() == (probe["attention_mask"] == 0).sum()
    assert logits_of(built, probe).shape == (2, 3)
    longer = torch.full((1, 39), 6)
    with pytest.raises((IndexError, RuntimeError), match="out of "):
        built(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_a_variant_that_no_shape_describes_is_opened_to_be_measured(tmp_path: Path) -> None:
    build("albert", num_hidden_groups=3).save_pretrained(tmp_path)
    assert open_artifact(tmp_path).shape is None
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_groups": 1, "hidden_size": 0}))
    with pytest.raises(Exception, match="no number above 0 for hidden_size"):
        open_artifact(tmp_path)
