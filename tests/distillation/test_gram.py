"""`attention_scores` without the maps: equal to a loss with maps, in value and gradient, and no map in sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hfcompress.models.forward import Observation
from hfcompress.training.loss import Step
from tests.seen import loss, task

LENGTH = 40


def heads_of(heads: int, width: int, rows: int, seed: int, like: Tensor | None = None, noise: float = 1.0) -> Tensor:
    """`(rows, heads, LENGTH, width)` with the strides that a model's have."""
    random = torch.randn(rows, LENGTH, heads * width, generator=torch.Generator().manual_seed(seed))
    base = 0 if like is None else like.detach().transpose(1, 2).flatten(2)
    return (base + noise * random).requires_grad_().unflatten(-1, (heads, width)).transpose(1, 2)


def step_of(heads: int, width: int, taught_width: int, close: float | None = None, rows: int = 3) -> Step:
    """A step of two layers each; with `close` the student is that near to its teacher."""
    taught = [{i: heads_of(heads, taught_width, rows, 10 * i + k) for i in (1, 2)} for k in (0, 1)]
    near = [{i: t if close is not None else None for i, t in some.items()} for some in taught]
    ours = [
        {i: heads_of(heads, width, rows, 100 + 10 * i + k, like, close or 1.0) for i, like in some.items()}
        for k, some in enumerate(near)
    ]
    logits = torch.zeros(rows, 2)
    mask = torch.arange(LENGTH)[None] < torch.tensor([LENGTH, 23, 1])[:rows, None]
    student, teacher = (Observation(logits, (), *some) for some in (ours, taught))
    return Step(student, teacher, mask, None, ((1, 1), (2, 2)), task())


def with_maps(step: Step) -> Tensor:
    """TinyBERT's equation 7 over pairs of real tokens, with every map, in float64."""
    total = torch.zeros(())
    pairs = (step.mask[:, :, None] & step.mask[:, None, :]).unsqueeze(1)
    for m, g in step.pairs:
        maps = [
            seen.queries[i].double() @ seen.keys[i].double().mT / seen.queries[i].shape[-1] ** 0.5
            for seen, i in ((step.student, m), (step.require_teacher(), g))
        ]
        squares = (maps[0] - maps[1]) ** 2 * pairs
        total = total + (squares.sum((0, 2, 3)) / pairs.sum()).mean()
    return total


def slopes(found: Tensor, step: Step) -> list[Tensor]:
    return list(torch.autograd.grad(found, [*step.student.queries.values(), *step.student.keys.values()]))


def assert_equal(step: Step, value: float = 1e-5, gradient: float = 1e-4) -> None:
    found, expected = loss("attention_scores").compute(step, None), with_maps(step)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=value)
    for ours, theirs in zip(slopes(found, step), slopes(expected, step), strict=True):
        assert float((ours - theirs).norm()) <= gradient * float(theirs.norm())


class Watch(TorchDispatchMode):
    """Notes the shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        some = made if isinstance(made, tuple | list) else [made]
        self.shapes |= {tuple(tensor.shape) for tensor in some if isinstance(tensor, Tensor)}
        return made


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
@pytest.mark.parametrize(("width", "taught_width"), [(8, 8), (5, 16), (16, 7), (26, 64)])
def test_the_loss_equals_that_of_the_maps(heads: int, width: int, taught_width: int) -> None:
    assert_equal(step_of(heads, width, taught_width))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_without_padding_and_with_it(rows: int) -> None:
    assert_equal(step_of(2, 8, 8, rows=rows))


@pytest.mark.parametrize(
    ("width", "taught_width", "maps"), [(8, 5, False), (19, 5, False), (5, 19, False), (20, 5, True), (5, 20, True)]
)
def test_long_inputs_make_no_map_and_short_ones_no_gram_matrix(width: int, taught_width: int, maps: bool) -> None:
    step = step_of(2, width, taught_width)
    with Watch() as watch:
        loss("attention_scores").compute(step, None).backward()
    # A batched product folds rows and heads into one axis.
    ends = {shape[-2:] for shape in watch.shapes if len(shape) > 2}
    assert ((LENGTH, LENGTH) in ends) == maps
    assert ((taught_width, width) in ends) != maps


def test_float32_is_kept_under_autocast() -> None:
    step = step_of(4, 8, 8)
    expected = with_maps(step).item()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss("attention_scores").compute(step, None)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_bfloat16_inputs_are_accumulated_in_float32() -> None:
    """Products of bfloat16 numbers are exact in float32, so nothing is lost but what the inputs lack."""
    whole = step_of(4, 8, 8)

    def half(seen: Observation) -> Observation:
        parts = ({i: t.bfloat16() for i, t in some.items()} for some in (seen.queries, seen.keys))
        return Observation(seen.logits, (), *parts)

    step = Step(half(whole.student), half(whole.require_teacher()), whole.mask, None, whole.pairs, whole.task)
    assert loss("attention_scores").compute(step, None).item() == pytest.approx(with_maps(step).item(), rel=1e-5)


@pytest.mark.parametrize(("close", "value", "gradient"), [(0.1, 1e-4, 1e-4), (0.01, 1e-2, 1e-3), (0.001, 2.0, 1e-2)])
def test_near_convergence_the_value_blurs_before_the_gradient(close: float, value: float, gradient: float) -> None:
    assert_equal(step_of(4, 8, 8, close), value, gradient)


def test_at_convergence_the_gradient_is_small_and_finite() -> None:
    step = step_of(4, 8, 8)
    same = Step(step.student, step.student, step.mask, None, step.pairs, step.task)
    found = loss("attention_scores").compute(same, None)
    size = with_maps(step).item()
    assert abs(found.item()) < 1e-5 * size
    apart = [float(g.norm()) for g in slopes(loss("attention_scores").compute(step, None), step)]
    together = [float(g.norm()) for g in torch.autograd.grad(
        loss("attention_scores").compute(Step(step.student, detached(step.student), *rest(step)), None),
        [*step.student.queries.values(), *step.student.keys.values()])]  # fmt: skip
    assert all(b < 1e-4 * a for a, b in zip(apart, together, strict=True))


def test_a_step_downhill_goes_down_even_when_the_value_is_blurred() -> None:
    step = step_of(4, 8, 8, 0.01)
    names: list[Callable[[Observation], Any]] = [lambda seen: seen.queries, lambda seen: seen.keys]
    before = with_maps(step).item()
    gradients = iter(slopes(loss("attention_scores").compute(step, None), step))
    moved = [{i: t - 0.1 * next(gradients) for i, t in of(step.student).items()} for of in names]
    after = with_maps(Step(Observation(step.student.logits, (), *moved), step.teacher, *rest(step))).item()
    assert after < before


def detached(seen: Observation) -> Observation:
    return Observation(
        seen.logits, (), *({i: t.detach() for i, t in some.items()} for some in (seen.queries, seen.keys))
    )


def rest(step: Step) -> tuple[Any, ...]:
    return step.mask, None, step.pairs, step.task
