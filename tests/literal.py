"""Every loss as its paper writes it: row by row in float64, padding cut off, no care for speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hfcompress.training.loss import Step
from tests.seen import LENGTHS, rows

Pairwise = Callable[[Tensor, Tensor], Tensor]


def both(step: Step) -> list[tuple[Any, Any]]:
    return list(zip(rows(step.student), rows(step.require_teacher()), strict=True))


def through(learned: Any, states: Tensor, layer: int) -> Tensor:
    if learned is None:
        return states
    linear = learned[layer - 1] if isinstance(learned, torch.nn.ModuleList) else learned
    mapped = states @ linear.weight.double().T
    return mapped if linear.bias is None else mapped + linear.bias.double()


def square(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum() / len(a)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return 1 - (a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()


def over_tokens(step: Step, m: int, g: int, learned: Any, distance: Pairwise) -> Tensor:
    """The mean over the batch's real tokens of what a distance gives for two hidden states."""
    found = []
    for student, teacher in both(step):
        ours = through(learned, student.hidden_states[m], m)
        found += [distance(a, b) for a, b in zip(ours, teacher.hidden_states[g], strict=True)]
    return sum(found, torch.zeros(())) / len(found)


def embeddings(step: Step, learned: Any) -> Tensor:
    return over_tokens(step, 0, 0, learned, square)


def hidden_states(step: Step, learned: Any, distance: Pairwise = square) -> Tensor:
    return sum((over_tokens(step, m, g, learned, distance) for m, g in step.pairs), torch.zeros(()))


def hidden_cosines(step: Step, learned: Any) -> Tensor:
    return hidden_states(step, learned, angle)


def aligned(step: Step, learned: Any, distance: Pairwise = square) -> Tensor:
    """CoFi: the least sum over all strictly increasing maps."""
    depth = len(step.student.hidden_states) - 1
    maps = itertools.combinations(range(1, len(step.require_teacher().hidden_states)), depth)
    sums = [
        sum((over_tokens(step, m, g, learned, distance) for m, g in enumerate(chosen, 1)), torch.zeros(()))
        for chosen in maps
    ]
    return min(sums, key=Tensor.item)


def cosine(step: Step, learned: Any) -> Tensor:
    last, final = len(step.student.hidden_states) - 1, len(step.require_teacher().hidden_states) - 1
    return over_tokens(step, last, final, None, angle)


def scores(queries: Tensor, keys: Tensor) -> list[list[Tensor]]:
    """`Q Kᵀ / √d` of one head: `(length, d)` tensors."""
    return [[(q * k).sum() / math.sqrt(len(q)) for k in keys] for q in queries]


def attention_scores(step: Step, learned: Any) -> Tensor:
    total = torch.zeros(())
    for m, g in step.pairs:
        heads = step.student.queries[m].shape[1]
        for head in range(heads):
            squares = []
            for s, t in both(step):
                ours, theirs = scores(s.queries[m][head], s.keys[m][head]), scores(t.queries[g][head], t.keys[g][head])
                squares += [(a - b) ** 2 for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
            total = total + sum(squares, torch.zeros(())) / len(squares) / heads
    return total


def distributions(x: Tensor, y: Tensor) -> list[Tensor]:
    """Row by row the softmax of one head's scores."""
    powers = [torch.stack(row).exp() for row in scores(x, y)]
    return [row / row.sum() for row in powers]


def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    return (theirs * (theirs / ours).log()).sum()


def relation(x_s: Tensor, y_s: Tensor, x_t: Tensor, y_t: Tensor, distance: Pairwise = divergence) -> list[Tensor]:
    """One row's distances, head by head and token by token: `(heads, length, d)` tensors."""
    return [
        distance(ours, theirs)
        for head in range(len(x_s))
        for ours, theirs in zip(distributions(x_s[head], y_s[head]), distributions(x_t[head], y_t[head]), strict=True)
    ]


def attention_probabilities(step: Step, learned: Any, distance: Pairwise = divergence) -> Tensor:
    total = torch.zeros(())
    for m, g in step.pairs:
        found = []
        for s, t in both(step):
            found += relation(s.queries[m], s.keys[m], t.queries[g], t.keys[g], distance)
        total = total + torch.stack(found).mean()
    return total


def attention_probability_squares(step: Step, learned: Any) -> Tensor:
    def squares(ours: Tensor, theirs: Tensor) -> Tensor:
        return ((ours - theirs) ** 2).sum()

    per_token = attention_probabilities(step, learned, squares)
    return per_token * sum(LENGTHS) / sum(n**2 for n in LENGTHS)


def minilm(step: Step, learned: Any, g: int = 0) -> Tensor:
    m, g = max(step.student.queries), g or max(step.require_teacher().queries)
    found = []
    for s, t in both(step):
        attention = torch.stack(relation(s.queries[m], s.keys[m], t.queries[g], t.keys[g])).mean()
        found.append(attention + torch.stack(relation(s.values[m], s.values[m], t.values[g], t.values[g])).mean())
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
            ours, theirs = split(ours), split(theirs)
            found.append(alpha * torch.stack(relation(ours, ours, theirs, theirs)).mean())
    return torch.stack(found).sum() / len(LENGTHS)


def pkd(step: Step, learned: Any) -> Tensor:
    total, last = torch.zeros(()), len(step.student.hidden_states) - 1
    for m, g in step.pairs:
        if m != last:
            for s, t in both(step):
                ours, theirs = through(learned, s.hidden_states[m][0], m), t.hidden_states[g][0]
                total = total + ((ours / ours.norm() - theirs / theirs.norm()) ** 2).sum() / len(LENGTHS)
    return total


def rkd(step: Step, learned: Any, of: str = "cls", weights: tuple[float, float] = (1.0, 2.0)) -> Tensor:
    def huber(a: Tensor, b: Tensor) -> Tensor:
        far = (a - b).abs()
        return far**2 / 2 if far <= 1 else far - 0.5

    def points(seen: Any) -> list[Tensor]:
        states = [row.hidden_states[-1] for row in rows(seen)]
        return [x[0] if of == "cls" else x.mean(0) for x in states]

    def distances(x: list[Tensor]) -> list[Tensor]:
        found = [(x[i] - x[j]).norm() for i, j in itertools.permutations(range(len(x)), 2)]
        return [distance * len(found) / sum(found) for distance in found]

    def angles(x: list[Tensor]) -> list[Tensor]:
        return [1 - angle(x[i] - x[j], x[k] - x[j]) for i, j, k in itertools.permutations(range(len(x)), 3)]

    student, teacher = points(step.student), points(step.require_teacher())
    return sum(
        (
            weight * torch.stack([huber(a, b) for a, b in zip(of_what(student), of_what(teacher), strict=True)]).mean()
            for weight, of_what in zip(weights, (distances, angles), strict=True)
        ),
        torch.zeros(()),
    )


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
    for student, teacher in answers(step, masked_only):
        ours, theirs = (z.div(t).exp() / z.div(t).exp().sum() for z in (student, teacher))
        crossed = -(theirs * ours.log()).sum()
        found.append(divergence(ours, theirs) if of == "kl" else crossed)
    return torch.stack(found).mean() * (t**2 if squared else 1)


def logit_squares(step: Step, learned: Any) -> Tensor:
    found = [(a - b) ** 2 for ours, theirs in answers(step) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(found).mean()
