"""Gates, surgery, and what a forward pass shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hfcompress.models import modeling_pruned as pruned
from hfcompress.models.architectures import ARCHITECTURES, unit_counts
from hfcompress.models.forward import observe
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.gates import apply_gates
from tests import factories

ENCODERS = tuple(name for name, spec in ARCHITECTURES.items() if not spec.decoder)
PLAIN = ("bert", "distilbert", "roberta")
"""Those whose attention is `softmax(Q Kᵀ / √d)`, and whose first hidden state is what the embeddings give."""
ALL_HEADS, ALL_NEURONS = (0, 1, 2, 3), tuple(range(64))
HALF = tuple(range(1, 64, 2))

LAYOUTS = {
    "stock": [Keep(ALL_HEADS, HALF), Keep(ALL_HEADS, tuple(range(32)))],
    "even": [Keep((0, 2, 3), HALF), Keep((1, 2, 3), tuple(range(32)))],
    "uneven": [Keep((3,), tuple(range(48))), Keep((0, 1), (5, 6, 7, 60))],
    "no heads in a layer": [Keep((), HALF), Keep((0, 3), ALL_NEURONS)],
    "no neurons in a layer": [Keep(ALL_HEADS, ()), Keep((1,), HALF)],
    "nothing left of a layer": [Keep(ALL_HEADS, ALL_NEURONS), Keep((), ())],
    "no neurons anywhere": [Keep(ALL_HEADS, ()), Keep(ALL_HEADS, ())],
}


def layout(family: str, name: str) -> list[Keep]:
    """What stays of each layer's weights; ALBERT has those of one."""
    return LAYOUTS[name][-1:] if family == "albert" else LAYOUTS[name]


def build(family: str, attention: str = "sdpa", **config: Any) -> Any:
    built = factories.model(family, **config)
    if attention == "eager" or built._supports_sdpa:
        built.set_attn_implementation(attention)
    return built


def gates_of(keep: list[Keep], heads: int = 4, ffn: int = 64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ones where a unit stays, zeros where it goes."""
    return (
        [torch.zeros(heads).index_fill(0, torch.tensor(k.heads, dtype=torch.long), 1.0) for k in keep],
        [torch.zeros(ffn).index_fill(0, torch.tensor(k.neurons, dtype=torch.long), 1.0) for k in keep],
    )


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return observe(model, inputs).logits


def same(one: Any, other: Any) -> bool:
    """Whether two models have equal shapes and parameters."""
    a, b = one.state_dict(), other.state_dict()
    shapes = [shape_of(model.config.to_dict()) for model in (one, other)]
    return shapes[0] == shapes[1] and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoints_own_file_names_the_parts_as_the_families_do() -> None:
    named = {getattr(pruned, f"Pruned{prefix}Config").model_type: parts for prefix, parts in pruned.PARTS.items()}
    assert named.keys() == {f"pruned_{family}" for family in ARCHITECTURES}
    for family, spec in ARCHITECTURES.items():
        parts, keys, paths = named[f"pruned_{family}"], spec.keys, spec.modules
        assert parts["config"] == (keys.heads, keys.ffn)
        assert (parts["layers"], parts["mixed"], parts["gathered"]) == (
            paths.layers, paths.attention_output, paths.ffn_out,
        )  # fmt: skip
        assert parts["heads"] == (paths.query, paths.key, paths.value)
        assert sorted(parts["neurons"]) == sorted(path for path in (paths.ffn_in, paths.ffn_gate) if path)


@pytest.mark.parametrize("name", ["BertModel", "PrunedBert", "PrunedBertForNextSentencePrediction", "PrunedViTModel"])
def test_no_other_class_is_made(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(pruned, name)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ENCODERS)
def test_cutting_equals_gating(family: str, attention: str, name: str) -> None:
    model, keep, batch = build(family, attention), layout(family, name), factories.batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    small = cut(model, keep)

    with apply_gates(model, *gates_of(keep)):
        expected = logits(model, batch)
    assert torch.allclose(logits(small, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(model, batch), expected, atol=1e-3)
    assert small.config._attn_implementation == model.config._attn_implementation
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("family", "head"), [pair for pair in factories.headed() if pair[0] in ENCODERS])
def test_cutting_equals_gating_under_every_head(family: str, head: str) -> None:
    model, keep, batch = build(family, head=head), layout(family, "uneven"), factories.batch()
    small = cut(model, keep)
    with apply_gates(model, *gates_of(keep)):
        assert torch.allclose(logits(small, batch), logits(model, batch), atol=1e-5)
    assert type(small).__name__ == f"Pruned{type(model).__name__}"
    assert shape_of(small.config.to_dict(), head=head).parameters == small.num_parameters()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", ENCODERS)
def test_tensors_really_shrink_to_the_shape(family: str, name: str) -> None:
    model, keep = factories.model(family), layout(family, name)
    small = cut(model, keep)
    shape = shape_of(small.config.to_dict())
    count = sum(p.numel() for p in small.parameters())
    assert unit_counts(small) == ([len(k.heads) for k in keep], [len(k.neurons) for k in keep])
    told = keep * 2 if family == "albert" else keep
    assert [(x.heads, x.ffn) for x in shape.layers] == [(len(k.heads), len(k.neurons)) for k in told]
    assert count == shape.parameters < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ENCODERS)
def test_cutting_twice_in_either_order_equals_cutting_once(family: str) -> None:
    """Heads first, neurons first, or both in two steps: indices count what is there."""
    model, few = factories.model(family), tuple(range(48))
    steps = [
        ([Keep((3,), ALL_NEURONS), Keep((1, 3), ALL_NEURONS)], [Keep((0,), few), Keep((0, 1), (5, 6, 7, 60))]),
        ([Keep(ALL_HEADS, few), Keep(ALL_HEADS, (5, 6, 7, 60))], [Keep((3,), few), Keep((1, 3), (0, 1, 2, 3))]),
        ([Keep((1, 3), ALL_NEURONS), Keep((1, 2, 3), HALF)], [Keep((1,), few[:32]), Keep((0, 2), (2, 3))]),
    ]
    wanted = [[Keep((3,), few), Keep((1, 3), (5, 6, 7, 60))]] * 2 + [[Keep((3,), few[:32]), Keep((1, 3), (5, 7))]]
    for (first, second), keep in zip(steps, wanted, strict=True):
        last = slice(-1, None) if family == "albert" else slice(None)
        assert same(cut(cut(model, first[last]), second[last]), cut(model, keep[last]))


def test_a_table_of_biases_that_all_layers_share_is_cut_where_they_keep_the_same_heads() -> None:
    """MPNet adds column `h` of one table to the scores of head `h` of every layer."""
    model = factories.model("mpnet")
    table = model.mpnet.encoder.relative_attention_bias.weight
    other = cut(model, [Keep((0, 2), ALL_NEURONS), Keep((1, 2, 3), ALL_NEURONS)])
    alike = cut(model, [Keep((0, 2), ALL_NEURONS), Keep((0, 2), HALF)])
    assert torch.equal(other.mpnet.encoder.relative_attention_bias.weight, table)
    assert torch.equal(alike.mpnet.encoder.relative_attention_bias.weight, table[:, [0, 2]])
    told = other.config.layer_sizes
    assert [told[str(i)]["kept_heads"] for i in range(2)] == [[0, 2], [1, 2, 3]]
    assert not any("kept_heads" in layer for layer in alike.config.layer_sizes.values())
    # Columns that no layer reads any more go with the next cut.
    assert same(cut(other, [Keep((1,), ALL_NEURONS), Keep((1,), ALL_NEURONS)]),
                cut(model, [Keep((2,), ALL_NEURONS), Keep((2,), ALL_NEURONS)]))  # fmt: skip


@pytest.mark.parametrize("family", ENCODERS)
def test_a_pruned_model_can_be_copied_and_trained(family: str) -> None:
    small, batch = cut(factories.model(family), layout(family, "no heads in a layer")), factories.batch()
    twin = copy.deepcopy(small)
    observe(twin.train(), batch).logits.sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(logits(small, batch), logits(twin.eval(), batch))
    assert all(p.grad is None for p in small.parameters())
    assert all(p.grad is not None and p.numel() for p in twin.parameters() if p.requires_grad)


def test_a_cut_that_evens_an_uneven_model_gives_the_stock_class_again() -> None:
    model = factories.model()
    uneven = cut(model, [Keep(ALL_HEADS, tuple(range(48))), Keep(ALL_HEADS, HALF)])
    even = cut(uneven, [Keep(ALL_HEADS, tuple(range(32))), Keep(ALL_HEADS, tuple(range(32)))])
    assert type(uneven).__name__ == "PrunedBertForSequenceClassification"
    assert type(even) is type(model)
    assert same(even, cut(model, [Keep(ALL_HEADS, tuple(range(32))), Keep(ALL_HEADS, HALF)]))


def test_cutting_keeps_mode_and_settings() -> None:
    model = factories.model(labels=3, hidden_act="relu", id2label={0: "no", 1: "yes", 2: "so"}).train()
    small = cut(model, LAYOUTS["uneven"])
    assert small.training
    assert (small.config.hidden_act, small.config.id2label[2], small.config.num_labels) == ("relu", "so", 3)


# Gates


@pytest.mark.parametrize("family", [*PLAIN, "mpnet", "deberta-v2", "albert"])
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(family: str) -> None:
    model, batch = factories.model(family).double(), factories.batch()
    labels = torch.tensor([0, 1, 1, 0])

    def loss(gates: list[list[torch.Tensor]]) -> torch.Tensor:
        with apply_gates(model, *gates):
            return torch.nn.functional.cross_entropy(observe(model, batch).logits, labels)

    gates = [[torch.rand(n, dtype=torch.float64, requires_grad=True) for n in units] for units in unit_counts(model)]
    found = torch.autograd.grad(loss(gates), gates[0] + gates[1])
    for gate, gradient in zip(gates[0] + gates[1], found, strict=True):
        for unit in range(min(len(gate), 5)):
            step = torch.zeros_like(gate).index_fill(0, torch.tensor([unit]), 1e-5)
            moved = [[[g + sign * step if g is gate else g for g in u] for u in gates] for sign in (1, -1)]
            with torch.no_grad():
                slope = (loss(moved[0]) - loss(moved[1])) / 2e-5
            assert float(gradient[unit]) == pytest.approx(float(slope), abs=1e-8, rel=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_each_row_can_have_gates_of_its_own(family: str) -> None:
    model, batch = factories.model(family), factories.batch()
    rows = len(batch["input_ids"])
    torch.manual_seed(0)
    heads, neurons = [[torch.rand(rows, n) for n in units] for units in unit_counts(model)]
    with apply_gates(model, heads, neurons):
        together = logits(model, batch)
    for row in range(rows):
        with apply_gates(model, [h[row] for h in heads], [n[row] for n in neurons]):
            assert torch.allclose(logits(model, batch)[row], together[row], atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_open_gates_change_nothing_and_leave_no_trace(family: str) -> None:
    model, batch = factories.model(family), factories.batch()
    ones = [[torch.ones(n) for n in units] for units in unit_counts(model)]
    closed = [[torch.zeros(n) for n in units] for units in unit_counts(model)]
    plain = logits(model, batch)
    with apply_gates(model, *ones):
        assert torch.equal(logits(model, batch), plain)
    with pytest.raises(RuntimeError, match="inside"), apply_gates(model, *closed):
        raise RuntimeError("inside")
    assert torch.equal(logits(model, batch), plain)


def test_a_gate_is_needed_for_every_layer() -> None:
    model = factories.model()
    with (
        pytest.raises(ValueError, match="argument 2 is shorter"),
        apply_gates(model, [torch.ones(4)], [torch.ones(64)]),
    ):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


# What a forward pass shows


@pytest.mark.parametrize("family", PLAIN)
def test_queries_and_keys_give_the_attention_that_eager_shows(family: str) -> None:
    batch = factories.batch()
    seen = observe(factories.model(family, attn_implementation="sdpa"), batch, frozenset({"queries", "keys"}))
    eager = factories.model(family, attn_implementation="eager")
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True).attentions
    hidden_keys = batch["attention_mask"][:, None, None] == 0
    assert len(seen.queries) == len(seen.keys) == len(expected) == 2
    for queries, keys, attention in zip(seen.queries.values(), seen.keys.values(), expected, strict=True):
        scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
        assert torch.allclose(scores.masked_fill(hidden_keys, -torch.inf).softmax(-1), attention, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_hidden_states_are_the_embeddings_and_every_layer(family: str) -> None:
    model, batch = factories.model(family, layers=3), factories.batch()
    with torch.no_grad():
        seen = observe(model, batch, frozenset({"hidden_states"}))
        last = model.base_model(**batch).last_hidden_state
        embedded = model.base_model.embeddings(batch["input_ids"])
    assert len(seen.hidden_states) == 4
    assert torch.allclose(seen.hidden_states[0], embedded, atol=1e-6)
    assert torch.allclose(seen.hidden_states[-1], last, atol=1e-6)
    assert not seen.queries


def test_only_what_is_asked_for_is_kept_and_foreign_inputs_are_left_out() -> None:
    batch = {**factories.batch(), "token_type_ids": torch.zeros(4, 12, dtype=torch.long)}
    seen = observe(factories.model("distilbert"), batch)
    assert (seen.hidden_states, seen.queries, seen.keys, seen.values) == ((), {}, {}, {})


def test_hooks_go_even_when_the_pass_fails() -> None:
    model = factories.model()
    with pytest.raises(ValueError, match="input_ids"):
        observe(model, {"attention_mask": torch.ones(1, 3)}, frozenset({"queries", "keys"}))
    assert not any(module._forward_hooks for module in model.modules())
