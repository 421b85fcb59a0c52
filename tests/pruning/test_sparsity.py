"""Zeros inside the linear layers: exactly where a pattern says, kept by training, and counted to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of
from hfcompress.pruning.sparsity import (
    FixedZeros,
    apply_zeros,
    nonzero_masks,
    select_zeros,
    share_of_zeros,
    sparse_bytes,
    storage_sizes,
    zero,
)
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.utils.errors import HfcompressError
from tests import factories

ENCODERS = [name for name in ARCHITECTURES if name not in ("llama", "qwen2", "qwen3")]


def drawn(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random scores for every weight that may become zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(kept.shape, generator=generator) for name, kept in nonzero_masks(model).items()}


def before(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ENCODERS)
def test_only_the_linear_modules_of_the_layers_get_zeros(family: str) -> None:
    model = factories.model(family)
    then, names = before(model), set(nonzero_masks(model))
    zero(model, SparsityPattern(share=0.5), drawn(model))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, then[name])}
    assert changed == names
    inside = spec_of(model).modules
    paths = (inside.query, inside.key, inside.value, inside.attention_output, inside.ffn_in, inside.ffn_out)
    assert len(names) == len(layers_of(model)) * len(set(paths))


def test_within_a_matrix_the_lowest_scores_become_zero() -> None:
    model = factories.model()
    scores, then = drawn(model), before(model)
    zero(model, SparsityPattern(share=0.3), scores)
    for name, score in scores.items():
        limit = score.flatten().sort().values[round(score.numel() * 0.3)]
        assert torch.equal(model.state_dict()[name], torch.where(score < limit, 0, then[name]))


def test_within_a_row_each_row_loses_as_much() -> None:
    model = factories.model()
    scores = drawn(model)
    for name, gone in select_zeros(model, SparsityPattern(share=0.25, scope="row"), scores).items():
        width = gone.shape[1]
        assert gone.sum(1).tolist() == [width // 4] * len(gone)
        assert bool((scores[name].masked_fill(~gone, 0).amax(1) <= scores[name].masked_fill(gone, 9).amin(1)).all())


def test_over_all_matrices_the_lowest_scores_become_zero_wherever_they_are() -> None:
    model = factories.model()
    scores = drawn(model)
    cheap = next(iter(scores))
    scores[cheap] = scores[cheap] / 100
    gone = select_zeros(model, SparsityPattern(share=0.2, scope="global"), scores)
    assert bool(gone[cheap].all())
    everything = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.cat([mask.flatten() for mask in gone.values()])
    assert int(chosen.sum()) == round(0.2 * len(everything))
    assert float(everything[chosen].max()) <= float(everything[~chosen].min())


def test_of_equal_scores_exactly_the_share_goes() -> None:
    model = factories.model()
    scores = {name: torch.zeros_like(score) for name, score in drawn(model).items()}
    for scope in ("row", "layer", "global"):
        gone = select_zeros(model, SparsityPattern(share=0.5, scope=scope), scores)
        assert sum(int(mask.sum()) for mask in gone.values()) * 2 == sum(mask.numel() for mask in gone.values())


def test_of_each_four_weights_along_the_input_the_best_two_stay() -> None:
    model = factories.model()
    scores = drawn(model)
    for name, gone in select_zeros(model, SparsityPattern(n_of_m=(2, 4)), scores).items():
        for row, mask in zip(scores[name][:3], gone[:3], strict=True):
            for at in range(0, len(row), 4):
                best = row[at : at + 4].topk(2).indices.tolist()
                assert (~mask[at : at + 4]).nonzero().flatten().tolist() == sorted(best)


def test_one_of_three_leaves_a_third() -> None:
    model = factories.model(hidden=24, heads=4, ffn=48)
    zero(model, SparsityPattern(n_of_m=(1, 3)), drawn(model))
    assert share_of_zeros(model) == pytest.approx(2 / 3)


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_a_block_goes_by_the_sum_of_its_scores(scope: Any) -> None:
    model = factories.model()
    scores = drawn(model)
    found = select_zeros(model, SparsityPattern(share=0.5, scope=scope, block=(4, 8)), scores)
    for name, gone in found.items():
        blocks = gone.view(gone.shape[0] // 4, 4, gone.shape[1] // 8, 8)
        assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))
        if scope == "layer":
            sums = scores[name].view(blocks.shape).sum((1, 3))
            cut = blocks[:, 0, :, 0]
            assert int(cut.sum()) * 2 == cut.numel()
            assert float(sums[cut].max()) < float(sums[~cut].min())


@pytest.mark.parametrize(
    ("pattern", "what"), [({"n_of_m": (2, 5)}, "groups of 5"), ({"share": 0.5, "block": (7, 1)}, "blocks of 7 x 1")]
)
def test_what_does_not_tile_a_matrix_is_refused_and_nothing_changes(pattern: Any, what: str) -> None:
    model = factories.model()
    then = before(model)
    with pytest.raises(HfcompressError, match=what) as caught:
        zero(model, SparsityPattern(**pattern), drawn(model))
    assert "32 x 32" in str(caught.value)
    assert all(torch.equal(tensor, then[name]) for name, tensor in model.state_dict().items())


def test_training_keeps_the_zeros_and_moves_the_rest() -> None:
    model = factories.model()
    zero(model, SparsityPattern(share=0.5), drawn(model))
    then, kept, masks = before(model), nonzero_masks(model), FixedZeros(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(1, 4):
        model(**factories.batch(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        assert share_of_zeros(model) < 0.5
        masks.after_step(model, step, 3)
    assert share_of_zeros(model) == 0.5
    for name, mask in kept.items():
        weight = model.state_dict()[name]
        assert not weight[~mask].any()
        assert bool((weight[mask] != then[name][mask]).float().mean() > 0.9)


def test_the_zeros_travel_with_a_checkpoint() -> None:
    model = factories.model()
    fresh = FixedZeros(model)
    zero(model, SparsityPattern(share=0.5), drawn(model))
    fresh.load_state_dict(FixedZeros(model).state_dict())
    other = factories.model(seed=1)
    fresh.after_step(other, 1, 1)
    assert all(torch.equal(mask, nonzero_masks(other)[name]) for name, mask in nonzero_masks(model).items())


def test_the_zeros_of_one_model_are_put_on_the_weights_of_another() -> None:
    model, early = factories.model(), factories.model(seed=1)
    then = before(early)
    zero(model, SparsityPattern(share=0.5), drawn(model))
    kept = nonzero_masks(model)
    assert apply_zeros(early, kept) is early
    for name, tensor in early.state_dict().items():
        assert torch.equal(tensor, then[name] * kept[name] if name in kept else then[name])


def test_bytes_of_each_format_by_hand() -> None:
    weight = torch.zeros(3, 8)
    weight[0, :2] = weight[1, 4] = weight[2, 7] = 1.5
    assert storage_sizes(weight) == {
        "dense": 3 * 8 * 4,
        "bitmask": 3 + 4 * 4,
        "csr": 4 * (4 + 2) + 4 * 4,
        "2:4": 12 * 4 + 3,
    }
    weight[0, 2] = 1
    assert "2:4" not in storage_sizes(weight)
    assert "2:4" not in storage_sizes(torch.ones(2, 6))
    assert "csr" not in storage_sizes(torch.zeros(1, 2**16 + 1))
    assert storage_sizes(weight.half())["bitmask"] == 3 + 5 * 2


def test_sparse_bytes_count_each_matrix_in_its_cheapest_format_and_the_rest_dense() -> None:
    model = factories.model()
    dense = sum(p.nbytes for p in model.parameters())
    assert sparse_bytes(model) == dense
    zero(model, SparsityPattern(n_of_m=(2, 4)), drawn(model))
    weights = [model.state_dict()[name] for name in nonzero_masks(model)]
    saved = sum(w.nbytes - w.nbytes // 2 - w.numel() // 8 for w in weights)
    assert sparse_bytes(model) == dense - saved
    zero(model, SparsityPattern(share=0.99), drawn(model))
    rest = dense - sum(w.nbytes for w in weights)
    best = [min(w.numel() // 8 + 4 * n, 6 * n + 4 * len(w) + 4) for w in weights for n in [int((w != 0).sum())]]
    assert sparse_bytes(model) == rest + sum(best)


def test_words_that_a_mask_head_shares_count_once() -> None:
    model = factories.model(head="mask")
    assert sparse_bytes(model) == sum(p.nbytes for p in model.parameters())
