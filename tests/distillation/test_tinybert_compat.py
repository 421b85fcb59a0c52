"""`tinybert_compat`: the losses of TinyBERT's code of 2019, against a literal port of its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfcompress.models.forward import observe
from hfcompress.training.loss import Loss, Step
from tests import factories
from tests.seen import changed, loss, observed, repadded, shape, step, task, token_labels

PAIRS = ((1, 2), (2, 4))


def term(name: str) -> Loss:
    return loss(name, tinybert_compat=True)


def published_scores(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """The scores as the model returned them: the mask of keys is added, whatever the query."""
    return queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5 + (1 - mask.float())[:, None, None, :] * -10000.0


def published_attention(seen: Step) -> Tensor:
    total: Any = 0.0
    for m, g in seen.pairs:
        student = published_scores(seen.student.queries[m], seen.student.keys[m], seen.mask)
        teacher = published_scores(seen.require_teacher().queries[g], seen.require_teacher().keys[g], seen.mask)
        student = torch.where(student <= -1e2, torch.zeros_like(student), student)
        teacher = torch.where(teacher <= -1e2, torch.zeros_like(teacher), teacher)
        total = total + nn.MSELoss()(student, teacher)
    return total


def published_representations(seen: Step, fit_dense: nn.Linear) -> Tensor:
    """The embeddings and the mapped layers through one linear layer with a bias; padded tokens count."""
    total: Any = 0.0
    for m, g in ((0, 0), *seen.pairs):
        total = total + nn.MSELoss()(fit_dense(seen.student.hidden_states[m]), seen.require_teacher().hidden_states[g])
    return total


def published_soft_labels(seen: Step, t: float) -> Tensor:
    likelihood = F.log_softmax(seen.student.logits / t, dim=-1)
    return (-F.softmax(seen.require_teacher().logits / t, dim=-1) * likelihood).mean()


def slopes(found: Tensor, tensors: Any) -> list[Tensor]:
    return list(torch.autograd.grad(found, list(tensors)))


@pytest.mark.parametrize("hidden", [8, 12])
@pytest.mark.parametrize("size", [1.0, 12.0])
def test_attention_scores_keep_padded_queries_and_drop_low_scores(hidden: int, size: float) -> None:
    seen = step(observed(), observed(hidden, 4, seed=1), PAIRS)
    # Large queries: some scores are truly below -100.
    seen = Step(changed(seen.student, lambda t, _: t * size), changed(seen.require_teacher(), lambda t, _: t * size),
                seen.mask, None, PAIRS, seen.task)  # fmt: skip
    found, expected = term("attention_scores").compute(seen, None), published_attention(seen)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [*seen.student.queries.values(), *seen.student.keys.values()]
    for ours, theirs in zip(slopes(found, inputs), slopes(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    low = published_scores(seen.student.queries[1], seen.student.keys[1], torch.ones_like(seen.mask)) <= -1e2
    assert bool(low.any()) == (size > 1)


def test_padded_queries_count_in_attention_scores_and_padded_keys_do_not() -> None:
    seen = step(observed(), observed(layers=4, seed=1), PAIRS)
    whole = term("attention_scores").compute(seen, None).item()
    assert term("attention_scores").compute(repadded(seen, 9.0), None).item() != pytest.approx(whole, rel=1e-2)
    keys = Step(seen.student, seen.require_teacher(), seen.mask, None, PAIRS, seen.task)
    junk = repadded(keys, 9.0)
    mixed = [
        type(s)(s.logits, s.hidden_states, s.queries, j.keys, s.values)
        for s, j in ((keys.student, junk.student), (keys.require_teacher(), junk.require_teacher()))
    ]
    same = term("attention_scores").compute(Step(*mixed, seen.mask, None, PAIRS, seen.task), None).item()
    assert same == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("hidden", [8, 12])
def test_embeddings_and_hidden_states_share_one_projection_with_a_bias(hidden: int) -> None:
    seen = step(observed(), observed(hidden, 4, seed=1), PAIRS)
    terms = [term("embeddings"), term("hidden_states")]
    assert len({x.projection_name(x.name) for x in terms}) == 1
    assert loss("embeddings").projection_name("mine") == loss("hidden_states").projection_name("mine") == "mine"
    learned: Any = terms[0].make_projection(shape(), shape(hidden, 4))
    assert type(learned) is type(terms[1].make_projection(shape(), shape(hidden, 4))) is nn.Linear
    found = torch.stack([x.compute(seen, learned) for x in terms]).sum()
    expected = published_representations(seen, learned)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [*seen.student.hidden_states, learned.weight, learned.bias]
    for ours, theirs in zip(slopes(found, inputs), slopes(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize("labels", [2, 3])
def test_soft_labels_are_the_mean_over_classes_without_the_squared_temperature(t: float, labels: int) -> None:
    seen = step(observed(labels=labels), observed(labels=labels, seed=1))
    found = loss("soft_labels", tinybert_compat=True, temperature=t).compute(seen, None)
    expected = published_soft_labels(seen, t)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(*(slopes(x, [seen.student.logits])[0] for x in (found, expected)))


def test_soft_labels_of_tokens_are_the_mean_over_labelled_ones_and_classes() -> None:
    seen = step(observed(head="token"), observed(seed=1, head="token"), head="token", labels=token_labels())
    asked = token_labels() != -100
    picked = [x.logits[asked] for x in (seen.student, seen.require_teacher())]
    expected = (-F.softmax(picked[1], -1) * F.log_softmax(picked[0], -1)).mean()
    assert term("soft_labels").compute(seen, None).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_objective_has_one_projection_for_both() -> None:
    from hfcompress.models.shape import shape_of
    from hfcompress.training.objective import Objective

    models = factories.model("bert", hidden=16), factories.model("bert", layers=4, seed=1)
    teacher, terms = shape_of(models[1].config.to_dict()), [term("embeddings"), term("hidden_states")]
    objective = Objective(models[0], terms, task(), teacher, PAIRS)
    assert [tuple(p.shape) for p in objective.learned.parameters()] == [(32, 16), (32,)]
    batch = factories.batch()
    found = objective(teacher=observe(models[1], batch, objective.needs), **batch)
    found["loss"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in objective.learned.parameters())  # type: ignore[union-attr]
    apart = Objective(models[0], [loss("embeddings"), loss("hidden_states")], task(), teacher, PAIRS)
    assert [tuple(p.shape) for p in apart.learned.parameters()] == [(32, 16), (32, 16)]
