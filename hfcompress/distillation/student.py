"""The `student:` block of a stage: the shape of the student, and the origin of its first weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from hfcompress.context import report_missing
from hfcompress.distillation.layer_map import pairs_of
from hfcompress.models.adapters import EXTRA, missing_modules
from hfcompress.models.bounds import LARGEST
from hfcompress.models.shape import Shape
from hfcompress.training.lora import Lora, init_problems
from hfcompress.utils.errors import Problem, did_you_mean
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task


class Preset(NamedTuple):
    """A published student.

    Attributes:
        source: The paper with its sizes.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    source: str


_TINYBERT = "TinyBERT, Jiao et al. 2020, arXiv:1909.10351"
_MINILM = "MiniLM, Wang et al. 2020, arXiv:2002.10957"
_WELL_READ = "Well-Read Students Learn Better, Turc et al. 2019, arXiv:1908.08962"
PRESETS: dict[str, Preset] = {
    "tinybert-4-312": Preset(4, 312, 12, 1200, _TINYBERT),
    "tinybert-6-768": Preset(6, 768, 12, 3072, _TINYBERT),
    "minilm-6-384": Preset(6, 384, 12, 1536, _MINILM),
    "minilm-12-384": Preset(12, 384, 12, 1536, _MINILM),
    "distilbert-6-768": Preset(6, 768, 12, 3072, "DistilBERT, Sanh et al. 2019, arXiv:1910.01108"),
    "bert-tiny": Preset(2, 128, 2, 512, _WELL_READ),
    "bert-mini": Preset(4, 256, 4, 1024, _WELL_READ),
    "bert-small": Preset(4, 512, 8, 2048, _WELL_READ),
    "bert-medium": Preset(8, 512, 8, 2048, _WELL_READ),
}


class Student(StrictModel):
    """The shape and the first weights of a student. Missing sizes are those of the model that the weights come from.

    The architecture stays the same. A bottleneck as in MobileBERT is not possible: the configs cannot express layers
    that are narrower than the residual stream.
    """

    preset: str | None = None
    """A published shape: tinybert-4-312, tinybert-6-768, minilm-6-384, minilm-12-384, distilbert-6-768, bert-tiny
    (2-128), bert-mini (4-256), bert-small (4-512) or bert-medium (8-512). The keys below override it."""
    layers: int | None = Field(default=None, ge=1, le=LARGEST["layers"])
    hidden: int | None = Field(default=None, ge=1, le=LARGEST["width"])
    heads: int | None = Field(default=None, ge=1, le=LARGEST["heads"])
    ffn: int | None = Field(default=None, ge=1, le=LARGEST["width"])
    positions: int | None = Field(default=None, ge=4, le=LARGEST["positions"])
    """The rows of the position table: the longest input that the student can read."""
    origin: str = Field(default="parent", alias="from")
    """The model that the weights come from: `parent` (of the stage before), `source`, `model` (the recipe's own), an
    earlier stage such as `01-distill`, a directory or a Hub id. A general checkpoint gets a new
    task head."""
    init: Literal["copy", "random"] = "copy"
    """`copy` copies every tensor from the model in `from`, cut to the student's widths; `random` copies none."""
    layers_from: Literal["uniform", "top", "bottom"] | list[Annotated[int, Field(ge=1)]] = "uniform"
    """The layers that are copied: spread evenly (`uniform`), the last ones (`top`), the first ones (`bottom`), or a
    list with one for each of the student's layers, counted from 1. DistilBERT takes `[1, 3, 5, 8, 10, 12]` of 12."""
    width: Literal["first", "activation"] = "first"
    """The dimensions, heads and neurons that a narrower student keeps: the `first`, or those with the highest mean
    `activation` on training rows (Minitron, arXiv:2407.14679). All layers keep the same dimensions of the residual
    stream."""
    rows: int = Field(default=256, ge=1)
    """Training rows for `width: activation`, drawn with the recipe's seed."""
    vocabulary: Literal["keep", "corpus"] = "keep"
    """`corpus` keeps the tokens of the train and dev splits, special tokens and single characters: these texts are
    split as before, and other texts can still be split. A plan counts the whole vocabulary."""
    lora: Lora | None = None
    """Train LoRA adapters, which are merged before the student is saved."""

    @field_validator("preset")
    @classmethod
    def _require_known_preset(cls, name: str | None) -> str | None:
        if name is not None and name not in PRESETS:
            raise ValueError(f"there is no preset '{name}'; {did_you_mean(name, PRESETS)}")
        return name

    def shape(self, origin: Shape) -> Shape:
        """Computes the shape of a student with weights from a model of shape `origin`."""
        preset = PRESETS[self.preset] if self.preset else None
        layers = self.layers or (preset.layers if preset else len(origin.layers))
        hidden = self.hidden or (preset.hidden if preset else origin.hidden)
        told = origin.spec.keys.head_dim != ""
        own = max(layer.heads for layer in origin.layers) if told else origin.hidden // origin.head_dim
        heads = self.heads or (preset.heads if preset else own)
        ffn = self.ffn or (preset.ffn if preset else origin.layers[0].ffn)
        positions = self.positions or origin.positions
        # A decoder's heads keep their width, so that each dimension is rotated as before.
        head_dim = origin.head_dim if told else hidden // heads
        even = replace(origin, hidden=hidden, head_dim=head_dim, positions=positions, even=True)
        return even.with_layers(layers, heads, ffn)

    def layers_of(self, origin: Shape) -> list[int]:
        """Lists the layer (from 0) of the other model that each student layer is copied from."""
        if isinstance(self.layers_from, list):
            return [number - 1 for number in self.layers_from]
        pairs = pairs_of(self.layers_from, len(self.shape(origin).layers), len(origin.layers))
        return [number - 1 for _, number in pairs]

    def unavailable(self) -> list[Problem]:
        """Lists the packages that are not installed."""
        return report_missing(missing_modules(), EXTRA) if self.lora else []

    def problems(self, origin: Shape, task: Task) -> list[Problem]:
        """Lists the reasons why this student cannot be made from such a model; the keys start with `student`."""
        found = [*self._head_problems(origin), *self._position_problems(origin, task), *self._random_problems()]
        if self.init == "copy":
            found += self._layer_problems(origin)
        found += [replace(problem, key=("lora", *problem.key)) for problem in init_problems(self.lora)]
        return [replace(problem, key=("student", *problem.key)) for problem in found]

    def _head_problems(self, origin: Shape) -> list[Problem]:
        shape = self.shape(origin)
        hidden, heads = shape.hidden, shape.layers[0].heads
        key = ("heads",) if self.heads else ("hidden",)
        if hidden % heads and (shape.spec.heads_divide_hidden or not shape.spec.keys.head_dim):
            message = f"{heads} heads do not divide the hidden width {hidden}"
            fix = f"use {_nearest_divisor(hidden, heads)} heads, or another width"
            return [Problem(message, fix, key)]
        if heads % shape.group:
            message = f"{heads} heads do not form groups of {shape.group}, which share keys and values in this model"
            return [Problem(message, f"use a multiple of {shape.group}", key)]
        if shape.spec.rotary and shape.head_dim % 2:
            message = f"heads with {shape.head_dim} dimensions cannot be rotated: dimensions are rotated in pairs"
            return [Problem(message, "use another number of heads, or another width", key)]
        return []

    def _position_problems(self, origin: Shape, task: Task) -> list[Problem]:
        if self.positions is None:
            return []
        found, usable = [], self.shape(origin).usable_positions
        if task.max_length > usable:
            message = f"max_length is {task.max_length}, wider than the student's position table allows ({usable})"
            found.append(Problem(message, "lower task.max_length or raise student.positions", ("positions",)))
        if self.positions > origin.positions and self.init == "copy" and origin.spec.position_table:
            message = (
                f"the model it comes from has {origin.positions} positions, so the student cannot copy {self.positions}"
            )
            found.append(Problem(message, "lower it, or say `init: random`", ("positions",)))
        return found

    def _layer_problems(self, origin: Shape) -> list[Problem]:
        have, want = len(origin.layers), len(self.shape(origin).layers)
        key = ("layers_from",)
        if isinstance(self.layers_from, str):
            if self.layers_from == "uniform" or want <= have:
                return []
            message = f"the student has {want} layers and the model it comes from {have}"
            return [Problem(message, "say `uniform`, which repeats layers, or give a list", key)]
        found = []
        if len(self.layers_from) != want:
            message = f"{len(self.layers_from)} layers are named and the student has {want}"
            found.append(Problem(message, "name one for each of the student's", key))
        for index, number in enumerate(self.layers_from):
            if number > have:
                message = f"the model it comes from has {have} layers, so there is no layer {number}"
                found.append(Problem(message, "they are counted from 1", (*key, index)))
        return found

    def _random_problems(self) -> list[Problem]:
        idle = {
            "layers_from": "there are no layers to choose",
            "width": "there are no dimensions to choose",
            "lora": "the weights below the adapters would stay random",
        }
        if self.init == "copy":
            return []
        set_here = self.says(*idle)
        return [Problem(f"with `init: random` {idle[key]}", f"leave `{key}` or `init` out", (key,)) for key in set_here]


def _nearest_divisor(width: int, heads: int) -> int:
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - heads), n))
