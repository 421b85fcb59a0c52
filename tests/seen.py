"""Forward passes made of random numbers, at real and padded places alike, for losses to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfcompress.distillation.losses.base import LOSSES
from hfcompress.models.forward import Observation
from hfcompress.models.shape import Layer, Shape
from hfcompress.training.loss import Loss, Pairs, Step

LENGTHS = (7, 4, 1, 5)
ROWS, LONGEST = len(LENGTHS), max(LENGTHS)


def loss(name: str, **options: Any) -> Loss:
    return LOSSES.parse({"use": name, **options})


def shape(hidden: int = 8, layers: int = 2, heads: int = 2, labels: int = 3, **more: Any) -> Shape:
    return Shape("bert", (Layer(heads, 16),) * layers, hidden, hidden // heads, 20, 16, 2, labels, **more)


def observed(
    hidden: int = 8, layers: int = 2, heads: int = 2, labels: int = 3, seed: int = 0, head: str = "sequence"
) -> Observation:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).requires_grad_()

    logits = {"sequence": (labels,), "span": (LONGEST, 2)}.get(head, (LONGEST, labels))
    return Observation(
        random(ROWS, *logits),
        tuple(random(ROWS, LONGEST, hidden) for _ in range(layers + 1)),
        *({i + 1: random(ROWS, heads, LONGEST, hidden // heads) for i in range(layers)} for _ in range(3)),
    )


def mask() -> Tensor:
    return torch.arange(LONGEST)[None] < torch.tensor(LENGTHS)[:, None]


def token_labels() -> Tensor:
    """One label at every other real token."""
    return torch.where(mask() & (torch.arange(LONGEST) % 2 == 0), 1, -100)


def task(head: str = "sequence") -> Any:
    return SimpleNamespace(head=head, loss=lambda logits, labels, mask: F.cross_entropy(logits, labels))


def step(
    student: Observation,
    teacher: Observation | None,
    pairs: Pairs = ((1, 1), (2, 2)),
    head: str = "sequence",
    labels: Tensor | None = None,
    dynamic: bool = False,
) -> Step:
    return Step(student, teacher, mask(), labels, pairs, task(head), dynamic)


def tensors(seen: Observation) -> dict[str, Tensor]:
    """Every tensor of a pass by name."""
    found = {"logits": seen.logits} | {f"hidden {i}": t for i, t in enumerate(seen.hidden_states)}
    for name in ("queries", "keys", "values"):
        found |= {f"{name} {i}": t for i, t in getattr(seen, name).items()}
    return found


def changed(seen: Observation, change: Any) -> Observation:
    """The same pass with each tensor that has an axis of tokens changed: `change(tensor, axis)`."""
    over_tokens = seen.logits.dim() == 3
    return Observation(
        change(seen.logits, 1) if over_tokens else seen.logits,
        tuple(change(t, 1) for t in seen.hidden_states),
        *({i: change(t, 2) for i, t in some.items()} for some in (seen.queries, seen.keys, seen.values)),
    )


def repadded(given: Step, junk: float) -> Step:
    """The same step with another number at every padded place of both models."""

    def fill(tensor: Tensor, axis: int) -> Tensor:
        tensor = tensor.detach().clone()
        for row, length in enumerate(LENGTHS):
            tensor[row].narrow(axis - 1, length, LONGEST - length).fill_(junk)
        return tensor

    return replace(given, student=changed(given.student, fill), teacher=changed(given.require_teacher(), fill))


def widened(given: Step, more: int) -> Step:
    """The same step in a batch that is padded further."""

    def pad(tensor: Tensor, axis: int) -> Tensor:
        return F.pad(tensor, (*(0, 0) * (tensor.dim() - 1 - axis), 0, more), value=3.0)

    labels = given.labels
    if labels is not None and labels.dim() == 2:
        labels = F.pad(labels, (0, more), value=-100)
    return replace(given, student=changed(given.student, pad), teacher=changed(given.require_teacher(), pad),
                   mask=F.pad(given.mask, (0, more)), labels=labels)  # fmt: skip


def part(given: Step, some: slice) -> Step:
    """The step of some of its rows."""

    def of(seen: Observation) -> Observation:
        layers = ({i: t[some] for i, t in values.items()} for values in (seen.queries, seen.keys, seen.values))
        return Observation(seen.logits[some], tuple(t[some] for t in seen.hidden_states), *layers)

    labels = None if given.labels is None else given.labels[some]
    return replace(
        given, student=of(given.student), teacher=of(given.require_teacher()), mask=given.mask[some], labels=labels
    )


def rows(seen: Observation) -> Iterator[Observation]:
    """Row by row, in float64, without padding."""

    for row, length in enumerate(LENGTHS):

        def cut(tensor: Tensor, axis: int, row: int = row, length: int = length) -> Tensor:
            return tensor[row].narrow(axis - 1, 0, length).double()

        whole = changed(seen, cut)
        yield whole if seen.logits.dim() == 3 else replace(whole, logits=seen.logits[row].double())
