"""Every loss as its paper writes it, by PyTorch's own functions: row by row in float64, padding cut off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.training.loss import Step
from tests.seen import LENGTHS, rows

Distance = Callable[[Tensor, Tensor], Tensor]
"""One number for each vector of two tensors `(…, width)`."""


def both(step: Step) -> list[tuple[Any, Any]]:
    return list(zip(rows(step.student), rows(step.require_teacher()), strict=True))


def mean(found: Iterable[Tensor]) -> Tensor:
    """The mean of all numbers of all tensors."""
    return torch.cat([each.flatten() for each in found]).mean()


def through(learned: Any, states: Tensor, layer: int) -> Tensor:
    if learned is None:
        return states
    linear = learned[layer - 1] if isinstance(learned, torch.nn.ModuleList) else learned
    return F.linear(states, linear.weight.double(), None if linear.bias is None else linear.bias.double())


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b, reduction="none").mean(-1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(a, b, dim=-1)


def over_tokens(step: Step, m: int, g: int, learned: Any, distance: Distance) -> Tensor:
    """The mean over the batch's real tokens of what a distance gives for two hidden states."""
    return mean(distance(through(learned, s.hidden_states[m], m), t.hidden_states[g]) for s, t in both(step))


def embeddings(step: Step, learned: Any) -> Tensor:
    return over_tokens(step, 0, 0, learned, mean_square)


def hidden_states(step: Step, learned: Any, distance: Distance = mean_square) -> Tensor:
    return torch.stack([over_tokens(step, m, g, learned, distance) for m, g in step.pairs]).sum()


def hidden_cosines(step: Step, learned: Any) -> Tensor:
    return hidden_states(step, learned, angle)


def aligned(step: Step, learned: Any, distance: Distance = mean_square) -> Tensor:
    """CoFi: the least sum over all strictly increasing maps."""
    depth, layers = len(step.student.hidden_states) - 1, len(step.require_teacher().hidden_states)
    sums = [
        torch.stack([over_tokens(step, m, g, learned, distance) for m, g in enumerate(chosen, 1)]).sum()
        for chosen in itertools.combinations(range(1, layers), depth)
    ]
    return min(sums, key=Tensor.item)


def cosine(step: Step, learned: Any) -> Tensor:
    last, final = len(step.student.hidden_states) - 1, len(step.require_teacher().hidden_states) - 1
    return over_tokens(step, last, final, None, angle)


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """`Q Kᵀ / √d` of `(heads, length, d)` tensors."""
    return queries @ keys.transpose(1, 2) / math.sqrt(queries.shape[-1])


def attention_scores(step: Step, learned: Any) -> Tensor:
    return torch.stack(
        [
            mean(F.mse_loss(scores(s.queries[m], s.keys[m]), scores(t.queries[g], t.keys[g]), reduction="none")
                 for s, t in both(step))
            for m, g in step.pairs
        ]
    ).sum()  # fmt: skip


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    """`KL(theirs ‖ ours)` of each two rows of probabilities."""
    return F.kl_div(ours.log(), theirs, reduction="none").sum(-1)


def relation(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], distance: Distance = divergence) -> Tensor:
    """The distances of two relations, `softmax(X Yᵀ / √d)`, by head and token."""
    return distance(scores(*ours).softmax(-1), scores(*theirs).softmax(-1))


def attention_probabilities(step: Step, learned: Any, distance: Distance = divergence) -> Tensor:
    return torch.stack(
        [
            mean(relation((s.queries[m], s.keys[m]), (t.queries[g], t.keys[g]), distance) for s, t in both(step))
            for m, g in step.pairs
        ]
    ).sum()


def attention_probability_squares(step: Step, learned: Any) -> Tensor:
    per_token = attention_probabilities(step, learned, lambda ours, theirs: (ours - theirs).square().sum(-1))
    return per_token * sum(LENGTHS) / sum(n**2 for n in LENGTHS)


def minilm(step: Step, learned: Any, g: int = 0) -> Tensor:
    m, g = max(step.student.queries), g or max(step.require_teacher().queries)
    found = [
        relation((s.queries[m], s.keys[m]), (t.queries[g], t.keys[g])).mean()
        + relation((s.values[m],) * 2, (t.values[g],) * 2).mean()
        for s, t in both(step)
    ]
    return torch.stack(found).mean()


def minilm_v2(
    step: Step, learned: Any, heads: int = 2, g: int = 0, alphas: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> Tensor:
    def split(x: Tensor) -> Tensor:
        """The heads side by side, then cut into others: `(heads, length, width)`."""
        return torch.stack(torch.cat(list(x), dim=-1).chunk(heads, dim=-1))

    m, g = max(step.student.queries), g or max(step.require_teacher().queries)
    found = []
    for s, t in both(step):
        parts = [(s.queries[m], t.queries[g]), (s.keys[m], t.keys[g]), (s.values[m], t.values[g])]
        for alpha, (ours, theirs) in zip(alphas, parts, strict=True):
            found.append(alpha * relation((split(ours),) * 2, (split(theirs),) * 2).mean())
    return torch.stack(found).sum() / len(LENGTHS)


def pkd(step: Step, learned: Any) -> Tensor:
    total, last = torch.zeros(()), len(step.student.hidden_states) - 1
    for m, g in step.pairs:
        if m != last:
            for s, t in both(step):
                ours, theirs = through(learned, s.hidden_states[m][0], m), t.hidden_states[g][0]
                total = total + (F.normalize(ours, dim=0) - F.normalize(theirs, dim=0)).square().sum() / len(LENGTHS)
    return total


def rkd(step: Step, learned: Any, of: str = "cls", weights: tuple[float, float] = (1.0, 2.0)) -> Tensor:
    def points(seen: Any) -> list[Tensor]:
        states = [row.hidden_states[-1] for row in rows(seen)]
        return [x[0] if of == "cls" else x.mean(0) for x in states]

    def distances(x: list[Tensor]) -> Tensor:
        found = torch.stack([(a - b).norm() for a, b in itertools.permutations(x, 2)])
        return found / found.mean()

    def cosines(x: list[Tensor]) -> Tensor:
        return torch.stack([1 - angle(a - b, c - b) for a, b, c in itertools.permutations(x, 3)])

    student, teacher = points(step.student), points(step.require_teacher())
    parts = [F.huber_loss(relate(student), relate(teacher)) for relate in (distances, cosines)]
    return weights[0] * parts[0] + weights[1] * parts[1]


def answers(step: Step, masked_only: bool = False) -> list[tuple[Tensor, Tensor]]:
    """The logits of each distribution that counts, of the student and of the teacher."""
    found: list[tuple[Tensor, Tensor]] = []
    for row, (s, t) in enumerate(both(step)):
        head = step.task.head
        if head == "sequence":
            found.append((s.logits, t.logits))
        elif head == "span":
            found += [(s.logits[:, i], t.logits[:, i]) for i in (0, 1)]
        else:
            labelled = step.labels is not None and (head == "token" or masked_only)
            found += [
                (s.logits[i], t.logits[i])
                for i in range(LENGTHS[row])
                if not labelled or step.labels[row, i] != -100  # type: ignore[index]
            ]
    return found


def soft_labels(
    step: Step, learned: Any, of: str = "kl", t: float = 1.0, squared: bool = True, masked_only: bool = False
) -> Tensor:
    found = []
    for ours, theirs in answers(step, masked_only):
        wanted = (theirs / t).softmax(-1)
        found.append(divergence((ours / t).softmax(-1), wanted) if of == "kl" else F.cross_entropy(ours / t, wanted))
    return torch.stack(found).mean() * (t**2 if squared else 1)


def logit_squares(step: Step, learned: Any) -> Tensor:
    return mean(F.mse_loss(ours, theirs, reduction="none") for ours, theirs in answers(step))
