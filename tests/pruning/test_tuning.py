"""Rearrangement and mask tuning against the published problems, solved the long way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.forward import select_inputs
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning import mask_tuning
from hfcompress.pruning.gates import apply_gates, fold_gates
from hfcompress.pruning.gradients import unit_gradients
from hfcompress.pruning.mask_tuning import DAMPING, Gates, rearrange_masks, tune_masks
from tests import factories
from tests.two_threads import Two

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

ROWS = 12
KEEP = [Keep((0, 2), tuple(range(0, 64, 2))), Keep((1, 2, 3), tuple(range(10, 40)))]
FAMILIES = ("bert", "distilbert", "roberta", "modernbert", "deberta-v2", "electra", "mpnet", "llama")


def batches(model: Any, size: int = 4) -> list[dict[str, Tensor]]:
    batch = select_inputs(model, factories.batch(ROWS))
    return [{name: tensor[at : at + size] for name, tensor in batch.items()} for at in range(0, ROWS, size)]


def of_family(family: str) -> Any:
    """A model with four heads, each with keys and values of its own."""
    return factories.model(family, **({"num_key_value_heads": 4} if family == "llama" else {}))


# Rearrangement


def literal_swaps(kept: tuple[int, ...], rows: Tensor) -> tuple[int, ...]:
    """The published greedy search on gradient vectors: each candidate joins, then the best one leaves."""
    units = rows.shape[1]
    pruned = [u for u in range(units) if u not in kept]
    for unit in sorted(kept, key=lambda u: float(rows[:, u].pow(2).sum())):
        pruned.append(unit)
        without = [rows[:, [p for p in pruned if p != q]].sum(1).pow(2).sum() for q in pruned]
        pruned.pop(min(range(len(pruned)), key=lambda at: float(without[at])))
    return tuple(u for u in range(units) if u not in pruned)


def of_the_pruned(kept: tuple[int, ...], rows: Tensor) -> float:
    return float(rows[:, [u for u in range(rows.shape[1]) if u not in kept]].sum(1).pow(2).sum())


@pytest.mark.parametrize("seed", range(4))
def test_swaps_are_the_published_ones_and_never_for_the_worse(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, neurons = (torch.randn(20, units, generator=generator) for units in (8, 40))
    keep = [Keep((0, 1, 2, 5), tuple(range(7, 40, 2)))]
    found = rearrange_masks(keep, ([heads], [neurons]))
    for kept, now, rows in ((keep[0].heads, found[0].heads, heads), (keep[0].neurons, found[0].neurons, neurons)):
        assert now == literal_swaps(kept, rows)
        assert len(now) == len(kept)
        assert of_the_pruned(now, rows) < of_the_pruned(kept, rows)


def test_units_that_cancel_go_together() -> None:
    rows = torch.diag(torch.tensor([1.0, 2.0, 4.0, 5.0, 0.0, 6.0]))
    rows[:, 4] = -rows[:, 1]
    keep = [Keep((2, 3, 4, 5), ())]
    assert rearrange_masks(keep, ([rows], [torch.zeros(6, 0)]))[0].heads == (0, 2, 3, 5)


def test_where_all_or_nothing_stays_nothing_is_swapped() -> None:
    keep = [Keep((), (0, 1, 2))]
    assert rearrange_masks(keep, ([torch.randn(5, 2)], [torch.randn(5, 3)])) == keep


def test_gradients_of_a_model_are_what_is_expected() -> None:
    model = factories.model()
    labelled = [{**batch, "labels": torch.tensor([0, 1, 0, 1])} for batch in batches(model)]
    seen = list(unit_gradients(model, labelled, lambda logits, labels, _: F.cross_entropy(logits, labels)))
    heads, neurons = ([torch.cat(rows) for rows in zip(*side, strict=True)] for side in zip(*seen, strict=True))
    found = rearrange_masks(KEEP, (heads, neurons))
    assert [(len(k.heads), len(k.neurons)) for k in found] == [(len(k.heads), len(k.neurons)) for k in KEEP]
    assert found != KEEP


# Tuning


def sides(model: Any, gates: Gates | None, index: int, path: str) -> tuple[Tensor, Tensor]:
    """Of a block, for all real tokens: what goes into its last module, and the sum that its output ends in."""
    parts = spec_of(model).modules
    layer: Any = layers_of(model)[index]
    inputs, outputs, hidden = [], [], []
    handles = [layer.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))]
    seen: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        return lambda _module, args, output: seen.update({name + "<": args[0], name + ">": output})

    for name in (parts.attention_output, parts.ffn_in, parts.ffn_out):
        handles.append(layer.get_submodule(name).register_forward_hook(catch(name)))
    everything = [torch.ones(n) for n in unit_counts(model)[0]], [torch.ones(n) for n in unit_counts(model)[1]]
    with torch.no_grad(), apply_gates(model, *((gates.heads, gates.neurons) if gates else everything)):
        for batch in batches(model):
            model(**batch)
            mask = batch["attention_mask"].bool()
            residual = hidden[-1]
            if path == parts.ffn_out and model.config.model_type in ("modernbert", "llama"):
                residual = residual + seen[parts.attention_output + ">"]
            elif path == parts.ffn_out:
                residual = seen[parts.ffn_in + "<"]
            inputs.append(seen[path + "<"][mask])
            outputs.append((residual + seen[path + ">"])[mask])
    for handle in handles:
        handle.remove()
    return torch.cat(inputs).double(), torch.cat(outputs).double()


def block_error(model: Any, gates: Gates, index: int, path: str) -> float:
    return float((sides(model, gates, index, path)[1] - sides(model, None, index, path)[1]).pow(2).sum())


def untuned(model: Any, gates: Gates, index: int, path: str) -> Gates:
    """The gates as they were when a block's turn came: its own and all after it are 1 or 0."""
    ffn = path == spec_of(model).modules.ffn_out
    heads = [g if i < index or (i == index and ffn) else (g != 0).float() for i, g in enumerate(gates.heads)]
    neurons = [g if i < index else (g != 0).float() for i, g in enumerate(gates.neurons)]
    return Gates(heads, neurons, [])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_blocks_error_rises_and_the_errors_are_those_of_the_gated_model(family: str) -> None:
    model = of_family(family)
    gates, parts = tune_masks(model, KEEP, batches(model)), spec_of(model).modules
    blocks = [(index, path) for index in range(2) for path in (parts.attention_output, parts.ffn_out)]
    for (index, path), (before, after) in zip(blocks, gates.errors, strict=True):
        assert after < before
        was, now = (block_error(model, g, index, path) for g in (untuned(model, gates, index, path), gates))
        assert now < was
        assert now / was == pytest.approx(after / before, rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_the_scales_are_those_of_the_least_squares_problem_written_out(family: str) -> None:
    model = of_family(family)
    gates, parts = tune_masks(model, KEEP, batches(model)), spec_of(model).modules
    for index, path, found in (
        (0, parts.attention_output, gates.heads[0]),
        (0, parts.ffn_out, gates.neurons[0]),
        (1, parts.ffn_out, gates.neurons[1]),
    ):
        module: Any = layers_of(model)[index].get_submodule(path)
        turn = untuned(model, gates, index, path)
        inputs, sums = sides(model, turn, index, path)
        width = module.in_features // len(found)
        kept = found.nonzero().flatten().tolist()
        units = [slice(u * width, (u + 1) * width) for u in kept]
        weight = module.weight.detach().double()
        # One column a unit: what it adds to each dimension of each token.
        columns = torch.stack([(inputs[:, s] @ weight[:, s].T).flatten() for s in units], dim=1)
        beside = sums - inputs @ weight.T  # residual and bias
        wanted = (sides(model, None, index, path)[1] - beside).flatten()
        held = (DAMPING * columns.pow(2).sum(0).mean()).sqrt() * torch.eye(len(kept), dtype=torch.float64)
        solution = torch.linalg.lstsq(
            torch.cat([columns, held]), torch.cat([wanted, held @ torch.ones(len(kept), dtype=torch.float64)])
        ).solution
        assert torch.allclose(found[kept].double(), solution, atol=1e-3)
        assert not torch.allclose(solution, torch.ones_like(solution), atol=1e-2)


def test_layers_that_share_their_weights_get_one_set_of_scales() -> None:
    model = factories.model("albert")
    gates = tune_masks(model, [Keep((0, 2), tuple(range(60)))], batches(model))
    assert [len(g) for g in (*gates.heads, *gates.neurons)] == [4, 64]
    assert all(after < before for before, after in gates.errors)


def test_where_all_stays_there_is_nothing_to_tune() -> None:
    model = factories.model()
    everything = [Keep(tuple(range(4)), tuple(range(64)))] * 2
    gates = tune_masks(model, everything, batches(model))
    assert all(torch.allclose(gate, torch.ones_like(gate), atol=1e-4) for gate in (*gates.heads, *gates.neurons))
    assert all(before < 1e-6 for before, _ in gates.errors)


def test_a_block_without_units_is_left_alone() -> None:
    model = factories.model()
    keep = [Keep((), tuple(range(32))), Keep((0, 1, 2, 3), ())]
    gates = tune_masks(model, keep, batches(model))
    assert gates.heads[0].tolist() == [0] * 4
    assert gates.neurons[1].tolist() == [0] * 64
    assert gates.errors[0][0] == gates.errors[0][1]
    assert gates.errors[1][1] < gates.errors[1][0]
    again = tune_masks(cut(model, keep), [Keep((), tuple(range(16))), Keep((0, 1), ())], batches(model))
    assert [len(g) for g in (*again.heads, *again.neurons)] == [0, 4, 32, 0]


def test_a_block_whose_scales_are_too_large_keeps_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = factories.model()
    monkeypatch.setattr(mask_tuning, "LARGEST", 2.0)
    gates = tune_masks(model, KEEP, batches(model))
    assert set(gates.neurons[0].tolist()) == {0.0, 1.0}
    assert gates.errors[1][0] == gates.errors[1][1]
    assert set(gates.heads[0].tolist()) != {0.0, 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_gates_give_what_gates_give_and_so_does_the_cut_model(family: str) -> None:
    model = of_family(family)
    gates, inputs = tune_masks(model, KEEP, batches(model)), select_inputs(model, factories.batch())
    with torch.no_grad():
        with apply_gates(model, gates.heads, gates.neurons):
            expected = model(**inputs).logits
        fold_gates(model, gates.heads, gates.neurons)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-5)
        assert torch.allclose(cut(model, KEEP)(**inputs).logits, expected, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = factories.model().train()
    then = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tune_masks(model, KEEP, batches(model))
    assert model.training
    assert all(p.requires_grad and torch.equal(p, then[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_padding_and_batches_change_nothing() -> None:
    model = factories.model()
    one, other = tune_masks(model, KEEP, batches(model)), tune_masks(model, KEEP, batches(model, ROWS))
    for a, b in zip([*one.heads, *one.neurons], [*other.heads, *other.neurons], strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    mask = batches(model)[1]["attention_mask"].bool()
    noisy = [{**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 9)} for b in batches(model)]
    assert not mask.all()
    for a, b in zip(one.neurons, tune_masks(model, KEEP, noisy).neurons, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_two_processes_come_to_what_one_comes_to() -> None:
    model, two = factories.model(), Two()
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    keep = [Keep((), tuple(range(32)))]

    def work(rank: int) -> tuple[Any, Gates]:
        own = copy.deepcopy(model)
        swapped = rearrange_masks(keep, ([torch.zeros(5, 0)], [rows[rank::2]]), two.all_reduce_sum(rank))
        return swapped, tune_masks(own, KEEP, batches(model)[rank::2], all_reduce_sum=two.all_reduce_sum(rank))

    (swaps, one), (same_swaps, other) = two.run(work)
    alone = tune_masks(model, KEEP, batches(model))
    assert swaps == same_swaps == rearrange_masks(keep, ([torch.zeros(10, 0)], [rows]))
    for a, b, c in zip(*([*g.heads, *g.neurons] for g in (one, other, alone)), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, atol=1e-4)
