"""Scores of heads and neurons against literal references, and the choice that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfcompress.criteria.base import CRITERIA, Calibration, Scores
from hfcompress.model.artifact import load_model
from hfcompress.model.family import family_of
from hfcompress.model.gates import unit_counts
from hfcompress.model.observe import accepted
from hfcompress.model.surgery import Keep, cut
from hfcompress.stages.prune import choose, kept, quota
from tests import world

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = ("bert", "distilbert", "roberta")
UNEVEN = [Keep((3,), tuple(range(48))), Keep((0, 2), (5, 6, 7, 60))]
ROWS = 8


def calibration(size: int = ROWS, seed: int = 0) -> Calibration:
    """The same eight rows in batches of `size`, each cut to its longest row."""
    batch = world.batch(ROWS) | {"labels": torch.tensor([0, 1] * (ROWS // 2))}

    def batches(count: int) -> Any:
        for start in range(0, min(count, ROWS), size):
            part = {name: tensor[start : start + size] for name, tensor in batch.items()}
            longest = int(part["attention_mask"].sum(1).max())
            yield {name: tensor[:, :longest] if tensor.dim() == 2 else tensor for name, tensor in part.items()}

    return Calibration(batches, cross_entropy, seed)


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def flat(scores: Scores) -> list[Tensor]:
    return [*scores.heads, *scores.neurons]


def close(one: Scores, other: Scores) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(flat(one), flat(other), strict=True))


# Taylor


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_does_not_depend_on_the_batch_size(family: str) -> None:
    model, taylor = world.model(family), CRITERIA.parse("taylor")
    alone, together = (taylor.scores(model, calibration(size)) for size in (1, ROWS))
    for one, other in zip(flat(alone), flat(together), strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)
        assert float(one.max()) > 1e-4


def literal_taylor(model: Any) -> Scores:
    """Molchanov eq. 8 from activations: `|Σ_positions a ∂L/∂a|` of each unit, row by row, then the mean over rows."""
    family, stack = family_of(model), family_of(model).stack(model)
    caught: list[Tensor] = []

    def catch(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        caught.append(inputs[0])

    modules = [layer.get_submodule(path) for path in (family.attention_output, family.ffn_out) for layer in stack]
    counts = [count for units in unit_counts(model) for count in units]
    handles = [module.register_forward_pre_hook(catch) for module in modules]
    sums = [torch.zeros(count) for count in counts]
    for row in calibration(1).batches(ROWS):
        caught.clear()
        logits = model(**accepted(model, {k: v for k, v in row.items() if k != "labels"})).logits
        nn.functional.cross_entropy(logits, row["labels"]).backward()
        # Attention comes before the FFN in each layer, heads before neurons in the scores.
        for total, activation in zip(sums, caught[0::2] + caught[1::2], strict=True):
            assert activation.grad is not None
            total += (activation * activation.grad).detach().unflatten(-1, (len(total), -1)).sum((0, 1, 3)).abs()
    for handle in handles:
        handle.remove()
    return Scores([s / ROWS for s in sums[: len(stack)]], [s / ROWS for s in sums[len(stack) :]])


@pytest.mark.parametrize("shape", ["stock", "uneven"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_activation_times_its_gradient(family: str, shape: str) -> None:
    model = world.model(family) if shape == "stock" else cut(world.model(family), UNEVEN)
    assert close(CRITERIA.parse("taylor").scores(model, calibration(3)), literal_taylor(model))


def test_taylor_looks_at_as_many_rows_as_it_was_told() -> None:
    model = world.model()
    asked = []
    inner = calibration(1)

    def batches(count: int) -> Any:
        asked.append(count)
        return inner.batches(count)

    few = CRITERIA.parse({"use": "taylor", "rows": 2}).scores(model, Calibration(batches, inner.loss, 0))
    assert asked == [2]
    assert not close(few, CRITERIA.parse("taylor").scores(model, inner))


def test_taylor_leaves_the_model_as_it_was() -> None:
    model = world.model()
    model.classifier.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}

    def broken(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    CRITERIA.parse("taylor").scores(model, calibration())
    with pytest.raises(RuntimeError, match="no loss"):
        CRITERIA.parse("taylor").scores(model, Calibration(calibration().batches, broken, 0))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_unit_that_feeds_nothing_scores_zero() -> None:
    model = world.model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, 7] = 0
        model.bert.encoder.layer[1].attention.output.dense.weight[:, 8:16] = 0
    scores = CRITERIA.parse("taylor").scores(model, calibration())
    assert float(scores.neurons[0][7]) == 0
    assert float(scores.heads[1][1]) == 0
    assert float(scores.heads[1][0]) > 0


def test_cutting_what_taylor_ranks_low_hurts_less_than_what_it_ranks_high(teacher: Path, data: Path) -> None:
    model, words = load_model(teacher, "AutoModelForSequenceClassification"), world.tokenizer()
    lines = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    batch = dict(words([text for text, _ in lines], padding=True, return_tensors="pt"))
    labels = torch.tensor([int(label) for _, label in lines])
    rows = Calibration(lambda count: [{**batch, "labels": labels}], cross_entropy, 0)
    scores = CRITERIA.parse("taylor").scores(model, rows)

    def hurt(heads: list[Tensor], neurons: list[Tensor]) -> float:
        keep = [Keep(h, n) for h, n in zip(choose(heads, 0.5, 1, True), choose(neurons, 0.5, 8, True), strict=True)]
        with torch.no_grad():
            return nn.functional.cross_entropy(cut(model, keep)(**batch).logits, labels).item()

    low_cut = hurt(scores.heads, scores.neurons)
    high_cut = hurt([-s for s in scores.heads], [-s for s in scores.neurons])
    random = CRITERIA.parse("random").scores(model, rows)
    assert low_cut < hurt(random.heads, random.neurons) < high_cut


# Magnitude and random


@pytest.mark.parametrize("shape", ["stock", "uneven"])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_norm_of_a_unit_s_weights(family: str, shape: str) -> None:
    model = world.model(family) if shape == "stock" else cut(world.model(family), UNEVEN)
    scores, parts, width = CRITERIA.parse("magnitude").scores(model, calibration()), family_of(model), 8
    for layer, heads, neurons in zip(parts.stack(model), scores.heads, scores.neurons, strict=True):
        weight = {name: layer.get_submodule(getattr(parts, name)).weight.detach() for name in (
            "query", "key", "value", "attention_output", "ffn_in", "ffn_out")}  # fmt: skip
        for head, found in enumerate(heads):
            rows = slice(head * width, (head + 1) * width)
            removed = [weight["query"][rows], weight["key"][rows], weight["value"][rows]]
            removed.append(weight["attention_output"][:, rows])
            assert float(found) == pytest.approx(sum(float(w.pow(2).sum()) for w in removed) ** 0.5, rel=1e-5)
        for neuron, found in enumerate(neurons):
            removed = [weight["ffn_in"][neuron], weight["ffn_out"][:, neuron]]
            assert float(found) == pytest.approx(sum(float(w.pow(2).sum()) for w in removed) ** 0.5, rel=1e-5)


def test_random_is_decided_by_the_seed() -> None:
    model, random = world.model(), CRITERIA.parse("random")
    first, again, other = (random.scores(model, calibration(seed=seed)) for seed in (1, 1, 2))
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(flat(first), flat(other), strict=True))
    assert not torch.equal(first.heads[0], first.heads[1])


@pytest.mark.parametrize("name", CRITERIA.names())
def test_every_criterion_scores_every_unit_of_an_uneven_model(name: str) -> None:
    model = cut(world.model(), [Keep((), (1, 2, 3)), Keep((0, 2), ())])
    criterion = CRITERIA.parse(name)
    scores = criterion.scores(model, calibration())
    assert ([len(s) for s in scores.heads], [len(s) for s in scores.neurons]) == unit_counts(model)
    assert all(bool(s.isfinite().all()) for s in flat(scores))
    assert criterion.source


# The choice


@pytest.mark.parametrize(
    ("units", "share", "multiple", "stay"),
    [
        (12, 0.25, 1, 9),
        (12, 0.0, 1, 12),
        (12, 0.99, 1, 1),
        (3072, 0.4, 8, 1840),
        (64, 0.99, 8, 8),
        (1536, 0.5, 64, 768),
    ],
)
def test_what_stays_is_the_nearest_multiple_and_at_least_one(
    units: int, share: float, multiple: int, stay: int
) -> None:
    assert kept(units, share, multiple) == stay
    assert stay % multiple == 0
    assert abs(stay - units * (1 - share)) <= multiple / 2 or stay == multiple


def test_even_keeps_the_best_of_each_layer() -> None:
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([40.0, 10.0, 20.0, 30.0])]
    assert choose(scores, 0.5, 1, even=True) == [(1, 3), (0, 3)]
    assert choose(scores, 0.0, 1, even=True) == [(0, 1, 2, 3)] * 2
    assert choose(scores, 0.9, 1, even=True) == [(1,), (0,)]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.99])
def test_uneven_keeps_as_much_in_all_and_the_best_of_each_layer(share: float, multiple: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(width, generator=generator) ** power for width, power in ((64, 1), (32, 9), (16, 4))]
    chosen = choose(scores, share, multiple, even=False)
    planned = quota([len(s) for s in scores], share, multiple, even=False)
    assert sum(map(len, chosen)) == sum(planned) == max(kept(64 + 32 + 16, share, multiple), 3 * multiple)
    for values, stay in zip(scores, chosen, strict=True):
        assert multiple <= len(stay) <= len(values)
        assert len(stay) % multiple == 0
        assert stay == tuple(sorted(stay))
        gone = sorted(set(range(len(values))) - set(stay))
        assert not gone or float(values[list(stay)].min()) >= float(values[gone].max())


def test_uneven_ranks_the_layers_together_by_normalised_scores() -> None:
    spread, peaked = torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([1e3, 1.0, 1.0, 1.0])
    # Normalised, each of the first is 0.5; of the second only the first is above that, the rest next to nothing.
    assert choose([spread, peaked], 0.375, 1, even=False) == [(0, 1, 2, 3), (0,)]
    assert choose([1e6 * spread, 1e-6 * peaked], 0.375, 1, even=False) == [(0, 1, 2, 3), (0,)]


@pytest.mark.parametrize("even", [True, False])
def test_ties_are_decided_by_position(even: bool) -> None:
    scores = [torch.ones(8), torch.ones(8)]
    assert choose(scores, 0.5, 1, even) == ([(0, 1, 2, 3)] * 2 if even else [tuple(range(7)), (0,)])
    assert choose([torch.zeros(8)] * 2, 0.5, 4, even) == [(0, 1, 2, 3)] * 2
