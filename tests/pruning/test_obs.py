"""Optimal Brain Surgeon against the published formulas, written out; nothing here knows the fast way."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfcompress.models.architectures import layers_of, spec_of, unit_counts
from hfcompress.models.forward import observe
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.criteria.base import CRITERIA, Calibration
from hfcompress.pruning.obs.solver import DAMPING, damp, refit_columns, removal_costs, sparsify_weight
from hfcompress.pruning.sparsity import nonzero_masks, share_of_zeros
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.utils.distributed import AllReduce
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.two_threads import Two

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

ROWS = 16
FAMILIES = ("bert", "distilbert", "modernbert", "albert", "deberta-v2")


def rows() -> dict[str, Tensor]:
    return factories.batch(ROWS) | {"labels": torch.tensor([0, 1] * (ROWS // 2))}


def calibration(size: int = 4, only: slice = slice(None), all_reduce_sum: AllReduce = lambda _: None) -> Calibration:
    """The same rows in batches of `size`; of the batches those in `only`."""
    batch = rows()

    def batches(count: int) -> Iterable[Mapping[str, Tensor]]:
        starts = range(0, ROWS, size)
        return [{name: tensor[at : at + size] for name, tensor in batch.items()} for at in starts][only]

    return Calibration(
        batches, lambda logits, labels, mask: nn.functional.cross_entropy(logits, labels), 0, all_reduce_sum
    )


def problem(outputs: int, width: int, tokens: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the damp second moment of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5 + 0.3
    return torch.randn(outputs, width, generator=generator, dtype=torch.float64), damp(inputs.T @ inputs / tokens)


def published(weight: Tensor, moment: Tensor, width: int) -> tuple[list[int], list[float], list[Tensor]]:
    """ZipLM's eq. 2 and 3 and Gaussian elimination, one unit at a time: the order, each cost, the weight after each."""
    inverse, weight = moment.inverse(), weight.clone()
    left, order, costs, weights = list(range(weight.shape[1] // width)), [], [], []
    while left:
        blocks = {u: slice(u * width, (u + 1) * width) for u in left}
        cost = {u: float((weight[:, s] @ inverse[s, s].inverse() * weight[:, s]).sum()) for u, s in blocks.items()}
        unit = min(left, key=lambda u: cost[u])
        at = blocks[unit]
        within = inverse[at, at].inverse()
        weight = weight - weight[:, at] @ within @ inverse[at]
        inverse = inverse - inverse[:, at] @ within @ inverse[at]
        # What is gone is zero exactly; the inverse keeps a one there so that it can be asked again.
        weight[:, at] = 0
        left.remove(unit)
        order.append(unit)
        costs.append(cost[unit])
        weights.append(weight.clone())
    return order, costs, weights


@pytest.mark.parametrize(("units", "width"), [(6, 4), (150, 1), (5, 64)])
def test_units_are_removed_in_the_published_order_at_the_published_cost(units: int, width: int) -> None:
    weight, moment = problem(24, units * width, tokens=1000)
    order, costs, _ = published(weight, moment, width)
    found = removal_costs(weight.T @ weight, moment, units)
    assert found.argsort(stable=True).tolist() == order
    rising = torch.tensor(costs).cummax(0).values
    assert torch.allclose(found[order].float(), rising, rtol=1e-4)
    assert found.float().unique().numel() == units


def test_a_unit_that_does_more_together_with_another_costs_no_less_than_the_one_before() -> None:
    gram = torch.diag(torch.tensor([0.25, 1.0, 1.0], dtype=torch.float64))  # of equal twins rounding would choose
    inputs = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.1], [0.0, 0.0, 2.0]], dtype=torch.float64)
    costs = removal_costs(gram, damp(inputs.T @ inputs / 3), 3)
    assert costs.argsort().tolist() == [0, 1, 2]  # of the twins one costs nothing, then the other costs all
    assert costs[1] > 10 * costs[0]


@pytest.mark.parametrize("width", [1, 4])
def test_the_closed_form_is_where_the_published_updates_end_and_the_least_squares_solution(width: int) -> None:
    weight, moment = problem(8, 24)
    order, _, weights = published(weight, moment, width)
    gone = sorted(order[:3])
    columns = torch.tensor([c for c in range(24) if c // width not in gone])
    found = refit_columns(weight, moment, columns)
    assert torch.allclose(found, weights[2], atol=1e-8)
    # The same as a regression on inputs that have this second moment.
    inputs = torch.linalg.cholesky(moment).T
    solution = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution
    assert torch.allclose(found[:, columns], solution.T, atol=1e-8)
    assert not found[:, [c for c in range(24) if c // width in gone]].any()


def test_damping_is_a_share_of_the_mean_diagonal_and_makes_anything_invertible() -> None:
    moment = torch.diag(torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64))
    assert torch.allclose(damp(moment) - moment, torch.eye(3).double() * DAMPING * 4 / 3)
    assert torch.equal(damp(torch.zeros(2, 2)), torch.eye(2))


def literal_sparse_gpt(weight: Tensor, moment: Tensor, pattern: SparsityPattern) -> Tensor:
    """Algorithm 1 of Frantar & Alistarh 2023, without lazy batches: every error goes to all columns at once."""
    weight, upper = weight.clone(), torch.linalg.cholesky(moment.inverse(), upper=True)
    step = pattern.n_of_m[1] if pattern.n_of_m else 128
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % step == 0:
            saliency = weight[:, j : j + step] ** 2 / upper.diagonal()[j : j + step] ** 2
            if pattern.n_of_m:
                chosen = saliency.topk(pattern.n_of_m[1] - pattern.n_of_m[0], dim=1, largest=False).indices
                gone[:, j : j + step].scatter_(1, chosen, True)
            else:
                count = round(saliency.numel() * pattern.zeros)
                gone[:, j : j + step] = saliency <= saliency.flatten().sort().values[count - 1]
        error = weight[:, j] * gone[:, j] / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[gone[:, j], j] = 0
    return weight


@pytest.mark.parametrize("pattern", [{"share": 0.5}, {"share": 0.3}, {"n_of_m": (2, 4)}, {"n_of_m": (1, 4)}])
def test_weights_go_and_are_made_up_for_as_published(pattern: Any) -> None:
    weight, moment = problem(16, 200)
    found = sparsify_weight(weight, moment, SparsityPattern(**pattern))
    assert torch.allclose(found, literal_sparse_gpt(weight, moment, SparsityPattern(**pattern)), atol=1e-8)
    assert float((found == 0).double().mean()) == pytest.approx(SparsityPattern(**pattern).zeros, abs=1e-3)


def test_what_is_made_up_for_leaves_less_error_than_magnitude() -> None:
    weight = problem(16, 96)[0]
    inputs = problem(200, 12)[0] @ problem(12, 96)[0]  # of 96 inputs, most follow from others
    moment = damp(inputs.T @ inputs / 200)

    def error(sparse: Tensor) -> float:
        return float(((sparse - weight) @ moment * (sparse - weight)).sum())

    by_size = weight * (weight.abs() > weight.abs().median())
    assert error(sparsify_weight(weight, moment, SparsityPattern(share=0.5))) < 0.5 * error(by_size)


def test_rows_and_blocks_are_kept_to() -> None:
    weight, moment = problem(16, 192)
    by_row = sparsify_weight(weight, moment, SparsityPattern(share=0.25, scope="row")) == 0
    assert by_row.sum(1).tolist() == [48] * 16
    blocks = (sparsify_weight(weight, moment, SparsityPattern(share=0.5, block=(4, 24))) == 0).view(4, 4, 8, 24)
    assert torch.equal(blocks.all(3).all(1), blocks.any(3).any(1))
    assert float(blocks.double().mean()) == pytest.approx(0.5, abs=0.07)


# On models


def caught(model: Any, index: int, path: str, batch: Mapping[str, Tensor]) -> Tensor:
    """What goes into a module of a layer, at real tokens, from a plain forward pass."""
    found: list[Tensor] = []
    module = layers_of(model)[index].get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    with torch.no_grad():
        observe(model, {name: tensor for name, tensor in batch.items() if name != "labels"})
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x in found]).double()


def second(inputs: Tensor, around_mean: bool) -> Tensor:
    centred = inputs - inputs.mean(0) if around_mean else inputs
    return damp(centred.T @ centred / len(inputs))


def literal_curvature(model: Any, index: int, path: str) -> Tensor:
    """The second moment of each row's gradient by a module's output, row by row."""
    found, module = [], layers_of(model)[index].get_submodule(path)

    def catch(_module: Any, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        found.append(output)

    handle = module.register_forward_hook(catch)
    for row in range(ROWS):
        one = {name: tensor[row : row + 1] for name, tensor in rows().items()}
        labels = one.pop("labels")
        nn.functional.cross_entropy(observe(model, one).logits, labels).backward()
    handle.remove()
    gradients = torch.cat([x.grad.flatten(0, 1) for x in found if x.grad is not None]).double()
    return gradients.T @ gradients / ROWS


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_published_costs_of_the_models_own_layers(family: str) -> None:
    model = factories.model(family)
    then = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores, parts = CRITERIA.parse("obs").scores(model, calibration()), spec_of(model).modules
    assert all(parameter.grad is None for parameter in model.parameters())
    for index, layer in enumerate(layers_of(model)):
        for path, found in ((parts.attention_output, scores.heads[index]), (parts.ffn_out, scores.neurons[index])):
            module: Any = layer.get_submodule(path)
            # Outputs count by the gradient's second moment: as if they were turned and stretched by its square root.
            values, vectors = torch.linalg.eigh(literal_curvature(model, index, path))
            weight = values.clamp(min=0).sqrt()[:, None] * (vectors.T @ module.weight.detach().double())
            moment = second(caught(model, index, path, rows()), module.bias is not None)
            order, costs, _ = published(weight, moment, module.in_features // len(found))
            rising = torch.tensor(costs).cummax(0).values
            assert torch.allclose(found[order].double(), rising.double(), rtol=2e-3)
    assert all(torch.equal(tensor, then[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_a_block_that_the_loss_does_not_see_costs_nothing() -> None:
    model = factories.model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.weight.zero_()
    scores = CRITERIA.parse("obs").scores(model, calibration())
    assert all(not scores_.any() for scores_ in (*scores.heads, *scores.neurons))


def test_a_single_weight_costs_what_it_says() -> None:
    model, path = factories.model(), "intermediate.dense"
    found = CRITERIA.parse("obs").weight_scores(model, calibration())
    assert set(found) == set(nonzero_masks(model))
    inverse = second(caught(model, 1, path, rows()), around_mean=False).inverse().diagonal()
    weight = model.bert.encoder.layer[1].intermediate.dense.weight.detach().double()
    expected = weight**2 * literal_curvature(model, 1, path).diagonal()[:, None] / inverse
    assert torch.allclose(found[f"bert.encoder.layer.1.{path}.weight"].double(), expected, rtol=2e-3)


def test_padding_and_batches_change_nothing() -> None:
    model, obs = factories.model(), CRITERIA.parse("obs")
    whole = obs.scores(model, calibration())
    batch = rows()
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    other = Calibration(lambda _: [batch], calibration().loss, 0)
    for one, two in zip([*whole.heads, *whole.neurons], (s := obs.scores(model, other)).heads + s.neurons, strict=True):
        assert torch.allclose(one, two, rtol=1e-3)


def test_as_many_rows_are_asked_for_as_were_told() -> None:
    asked = []

    def batches(count: int) -> Iterable[Mapping[str, Tensor]]:
        asked.append(count)
        return calibration().batches(count)

    CRITERIA.parse({"use": "obs", "rows": 7}).scores(factories.model(), Calibration(batches, calibration().loss, 0))
    assert set(asked) == {7}


KEEP = [Keep((1, 3), tuple(range(0, 64, 2))), Keep((0,), tuple(range(5, 45)))]


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "deberta-v2"])
def test_a_refit_is_the_regression_on_what_earlier_layers_now_give(family: str) -> None:
    model, batch = factories.model(family), rows()
    then, parts = copy.deepcopy(model), spec_of(model).modules
    CRITERIA.parse("obs").refit(model, KEEP, calibration())
    for index, kept in enumerate(KEEP):
        for path, units, width in (
            (parts.attention_output, kept.heads, 8),
            (parts.ffn_out, kept.neurons, 1),
        ):
            new, old = (layers_of(m)[index].get_submodule(path) for m in (model, then))
            inputs = caught(model, index, path, batch)
            moment = second(inputs, new.bias is not None)
            columns = torch.tensor([u * width + i for u in units for i in range(width)])
            weight = old.weight.detach().double()
            solution = torch.linalg.solve(moment[columns][:, columns], moment[columns] @ weight.T).T
            assert torch.allclose(new.weight[:, columns].double(), solution, atol=1e-4)
            if new.bias is not None:  # the mean output is what it was
                means = [inputs.mean(0) @ m.weight.double().T + m.bias.double() for m in (new, old)]
                assert torch.allclose(*means, atol=1e-4)
    with torch.no_grad():
        told = {name: tensor for name, tensor in batch.items() if name != "labels"}
        assert torch.allclose(observe(model, told).logits, observe(cut(model, KEEP), told).logits, atol=1e-5)


def test_a_refit_model_is_nearer_to_the_whole_one_than_a_cut_one() -> None:
    model = factories.model()
    batch = {name: tensor for name, tensor in rows().items() if name != "labels"}
    with torch.no_grad():
        whole, plain = (observe(m, batch, frozenset({"hidden_states"})) for m in (model, cut(model, KEEP)))
        CRITERIA.parse("obs").refit(model, KEEP, calibration())
        fitted = observe(cut(model, KEEP), batch, frozenset({"hidden_states"}))
    mask = batch["attention_mask"].bool()
    for layer in (1, 2):
        far, near = (
            float((seen.hidden_states[layer] - whole.hidden_states[layer])[mask].norm()) for seen in (plain, fitted)
        )
        assert near < 0.7 * far


def test_keeping_everything_changes_nothing() -> None:
    model = factories.model()
    then = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    everything = [Keep(tuple(range(h)), tuple(range(n))) for h, n in zip(*unit_counts(model), strict=True)]
    CRITERIA.parse("obs").refit(model, everything, calibration())
    assert all(torch.equal(tensor, then[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [{"n_of_m": (2, 4)}, {"share": 0.5}])
def test_weights_go_layer_by_layer_on_what_the_pruned_layers_give(family: str, pattern: Any) -> None:
    model, then = factories.model(family), factories.model(family)
    CRITERIA.parse("obs").sparsify(model, SparsityPattern(**pattern), calibration())
    assert share_of_zeros(model) == pytest.approx(0.5, abs=0.01)
    parts = spec_of(model).modules
    last = len(layers_of(model)) - 1
    # All layers but the last as they are now, the last as it was: what it saw.
    state = {n: t for n, t in model.state_dict().items() if f"{parts.layers}.{last}." not in n}
    then.load_state_dict(state, strict=False)
    for path in (parts.query, parts.attention_output, parts.ffn_in, parts.ffn_out):
        moment = second(caught_tokens(then, last, path), around_mean=False)
        expected = sparsify_weight(layers_of(then)[last].get_submodule(path).weight, moment, SparsityPattern(**pattern))
        found = layers_of(model)[last].get_submodule(path).weight
        assert torch.allclose(found.double(), expected, atol=1e-3)


def caught_tokens(model: Any, index: int, path: str) -> Tensor:
    """As `caught`; DeBERTa's queries and keys also see relative positions, which are no tokens."""
    batch, found = rows(), []
    module = layers_of(model)[index].get_submodule(path)

    def keep(_module: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[:2] == batch["attention_mask"].shape:
            found.append(args[0])

    handle = module.register_forward_pre_hook(keep)
    with torch.no_grad():
        observe(model, {name: tensor for name, tensor in batch.items() if name != "labels"})
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x in found]).double()


def test_over_all_matrices_those_lose_most_that_miss_it_least() -> None:
    model = factories.model()
    with torch.no_grad():
        # Half of this matrix does next to nothing.
        model.bert.encoder.layer[1].output.dense.weight[:, :32] *= 1e-3
    CRITERIA.parse("obs").sparsify(model, SparsityPattern(share=0.3, scope="global"), calibration())
    shares = {name: float((~kept).float().mean()) for name, kept in nonzero_masks(model).items()}
    assert share_of_zeros(model) == pytest.approx(0.3, abs=0.01)
    ffn = {name for name in shares if name.startswith(("bert.encoder.layer.1.output", "bert.encoder.layer.1.inter"))}
    assert min(shares[name] for name in ffn) > max(share for name, share in shares.items() if name not in ffn)


def test_a_pattern_that_does_not_tile_is_refused_before_anything_changes() -> None:
    model = factories.model()
    then = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HfcompressError, match="groups of 5"):
        CRITERIA.parse("obs").sparsify(model, SparsityPattern(n_of_m=(2, 5)), calibration())
    assert all(torch.equal(tensor, then[name]) for name, tensor in model.state_dict().items())


def test_two_processes_come_to_what_one_comes_to() -> None:
    obs = CRITERIA.parse("obs")

    fresh = factories.model()

    def all_of_it(calibrated: Calibration) -> list[Tensor]:
        model, sparse = copy.deepcopy(fresh), copy.deepcopy(fresh)
        scores = obs.scores(model, calibrated)
        obs.refit(model, KEEP, calibrated)
        obs.sparsify(sparse, SparsityPattern(n_of_m=(2, 4)), calibrated)
        return [*scores.heads, *scores.neurons, *model.state_dict().values(), *sparse.state_dict().values()]

    two = Two()
    one, other = two.run(lambda rank: all_of_it(calibration(4, slice(rank, None, 2), two.all_reduce_sum(rank))))
    for alone, first, second_ in zip(all_of_it(calibration()), one, other, strict=True):
        assert torch.equal(first, second_)
        assert torch.allclose(alone, first, rtol=1e-3, atol=1e-4)  # solutions of float32 moments
