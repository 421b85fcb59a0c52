"""The layer map: the teacher layer that each student layer learns from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from hfcompress.training.loss import Pairs
from hfcompress.utils.errors import Problem, did_you_mean

Strategy = Literal["uniform", "last", "top", "bottom", "dynamic"]
Pair = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
_LIST: TypeAdapter[list[list[int]]] = TypeAdapter(Annotated[list[Pair], Field(min_length=1)])


def _parse(value: Any) -> Any:
    """Reads a layer map as a name or as a list, so that an error names only one of the two."""
    if isinstance(value, str) and value not in get_args(Strategy):
        raise ValueError(f"there is no layer map '{value}'; {did_you_mean(value, get_args(Strategy))}")
    if not isinstance(value, (str, list)):
        raise ValueError(
            f"a layer map is a name ({', '.join(get_args(Strategy))}) or a list of [student, teacher] pairs"
        )
    if isinstance(value, list):
        return _LIST.validate_python(value, strict=True)
    return value


LayerMap = Annotated[Strategy | list[Pair], BeforeValidator(_parse)]
"""A strategy, or pairs `[student layer, teacher layer]`, both from 1."""


def pairs_of(layer_map: Any, student: int, teacher: int) -> Pairs:
    """Lists the pairs of layers, from 1, of a layer map for a student and a teacher with these numbers of layers.

    `dynamic` starts with `uniform`; the hidden-state loss then chooses the map in each step.

    Source: uniform, top and bottom: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, table 4.
    """
    if isinstance(layer_map, list):
        return tuple((m, g) for m, g in layer_map)
    if layer_map == "last":
        return ((student, teacher),)
    chosen = {
        "uniform": uniform_map(student, teacher),
        "dynamic": uniform_map(student, teacher),
        "top": [teacher - student + m for m in range(1, student + 1)],
        "bottom": list(range(1, student + 1)),
    }[layer_map]
    return tuple(enumerate(chosen, start=1))


def uniform_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Spreads the student layers evenly: `g(m) = m N / M`, rounded; returns the teacher layer (from 1) of each.

    Source: TinyBERT, Jiao et al. 2020, arXiv:1909.10351, section 4.1. A deeper student repeats layers.
    """
    m, n = student_layers, teacher_layers
    return [max((2 * i * n + m) // (2 * m), 1) for i in range(1, m + 1)]


def layer_map_problems(layer_map: Any, student: int, teacher: int) -> list[Problem]:
    """Lists the problems of a layer map for a student and a teacher with these numbers of layers."""
    if isinstance(layer_map, list):
        found = []
        for index, (m, g) in enumerate(layer_map):
            for position, (number, limit, whose) in enumerate(((m, student, "student"), (g, teacher, "teacher"))):
                if number > limit:
                    message = f"the {whose} has {limit} layers, so there is no layer {number}"
                    fix = "pairs are [student layer, teacher layer], both from 1"
                    found.append(Problem(message, fix, ("layer_map", index, position)))
        return found
    if layer_map != "last" and student > teacher:
        message = f"the student has {student} layers and the teacher {teacher}"
        fix = "a loss on layers needs a student that is no deeper, `layer_map: last`, or explicit pairs"
        return [Problem(message, fix, ("layer_map",))]
    return []
