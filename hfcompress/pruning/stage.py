"""The prune stage: its options, and the shape that it plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.distillation.recovery import Recover
from hfcompress.models.artifact import Artifact
from hfcompress.models.bounds import LARGEST
from hfcompress.models.shape import Layer, Shape
from hfcompress.pruning.allocation import count_by_layer, count_kept
from hfcompress.pruning.budget import Budget
from hfcompress.pruning.criteria.base import CRITERIA, AnyCriterion
from hfcompress.pruning.description import describe, summarize
from hfcompress.pruning.figures import list_figures
from hfcompress.pruning.rules import find_problems
from hfcompress.pruning.schedules import Lottery, OneShot, Schedule
from hfcompress.pruning.sparsity_pattern import Pattern
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown
from hfcompress.utils.figures import Figure
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.local_models import LocalModels
    from hfcompress.data.task import Task


class Sensitivity(StrictModel):
    """How the metric falls when one block alone loses its least important units, for the card's picture."""

    shares: list[float] = Field(default=[0.25, 0.5, 0.75, 1.0], min_length=1)
    """Shares of a block's units that it loses."""
    rows: int = Field(default=512, ge=1)
    """Rows of the dev split that are scored."""


class Prune(Stage):
    """Cuts what matters least by a criterion, and trains what is left."""

    tag: ClassVar[str] = "pruning"
    report_key: ClassVar[str] = "cuts"
    report_heading: ClassVar[str] = "What was cut"
    reports: ClassVar[tuple[str, ...]] = (
        "kept", "vocabulary", "embedding_rank", "sparsity", "latency", "sensitivity",
    )  # fmt: skip

    kind: Literal["prune"] = "prune"
    criterion: AnyCriterion = Field(default_factory=lambda: CRITERIA.parse("taylor"))
    """What tells how much each part matters: a name, or a mapping `{use: NAME, …}` with options."""
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of the attention heads to cut; of a decoder with grouped queries, of its key-value heads."""
    ffn: float = Field(default=0.0, ge=0, lt=1)
    """Share of the FFN neurons to cut."""
    budget: Budget | None = None
    """What may stay of heads and neurons together, in place of `heads` and `ffn`."""
    attention_blocks: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """Attention blocks to cut whole: those whose heads' scores have the lowest sum."""
    ffn_blocks: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """FFN blocks to cut whole: those whose neurons' scores have the lowest sum."""
    layers: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """Whole layers to cut."""
    hidden: float = Field(default=0.0, ge=0, lt=1)
    """Share of the dimensions of the residual stream to cut, through embeddings, layers and head."""
    vocabulary: Literal["keep", "corpus"] = "keep"
    """`corpus` keeps the tokens of the train and dev splits, special tokens and single characters; the tokenizer is
    made anew. A plan counts the whole vocabulary."""
    embedding_rank: int | None = Field(default=None, ge=1, le=LARGEST["width"])
    """Make the word embeddings a product of two matrices with this inner width, the best one by the tokens' frequency
    in the train split; after `vocabulary`. What they lose, `recover` can train."""
    weights: Pattern | None = None
    """Single weights to set to zero, after everything else: `{share: 0.5}` or `{n_of_m: [2, 4]}`."""
    allocation: Literal["even", "uneven"] = "even"
    """`even` cuts the same number in every layer; `uneven` ranks all layers together, scores normalised by layer."""
    multiple_of: int = Field(default=8, ge=1, le=LARGEST["width"])
    """FFN widths, and the hidden width where it is cut, stay multiples of it, where hardware likes them."""
    empty_blocks: bool = False
    """Let a `budget` cut attention or FFN blocks whole."""
    schedule: Schedule = OneShot()
    """`one_shot`, `iterative`, `gradual` or `lottery`, with options as `{use: NAME, …}`."""
    rearrange: bool = False
    """Swap the chosen units for others of their layer where together these matter less (Kwon et al. 2022, section 3.3).
    """
    tune: Literal["off", "scales", "weights"] | None = None
    """Without training, make heads and neurons that stay take over from those that go, by least squares, layer by
    layer: `scales` multiplies each by a number, so that each block gives what it gave before (Kwon et al. 2022, section
    3.4); `weights` refits the matrix behind them (Kurtic et al. 2023, eq. 3). The default is `weights` where the
    criterion is `obs`, whose scores count on it, else `off`."""
    train: Recover | None = None
    """Training while masks are learned or gates close, or that each lottery ticket goes through."""
    recover: Recover | None = None
    """Training after the cut; after each round of `iterative`. None where it is left out."""
    sensitivity: Sensitivity | None = None
    """Draw how the metric falls with each layer's units; costs a pass over the rows for each layer, block and share."""

    def plan(self, shape: Shape) -> Shape:
        layers = shape.layers[: len(shape.layers) - self.layers]
        even = self.allocation == "even" and not (self.budget or self.attention_blocks or self.ffn_blocks)
        heads, ffn = [x.heads // shape.group for x in layers], [x.ffn for x in layers]
        if self.budget:
            heads = count_by_layer(heads, 1 - self.budget.share, 1, even=False)
            ffn = count_by_layer(ffn, 1 - self.budget.share, self.multiple_of, even=False)
        else:
            heads = count_by_layer(heads, self.heads, 1, even)
            ffn = count_by_layer(ffn, self.ffn, self.multiple_of, even)
        heads[len(heads) - self.attention_blocks :] = [0] * self.attention_blocks
        ffn[len(ffn) - self.ffn_blocks :] = [0] * self.ffn_blocks
        kept_layers = tuple(Layer(h * shape.group, f) for h, f in zip(heads, ffn, strict=True))
        hidden = count_kept(shape.hidden, self.hidden, self.multiple_of if self.hidden else 1)
        found = bool(self.budget) or self.vocabulary == "corpus"
        return replace(
            shape,
            layers=kept_layers,
            hidden=hidden,
            embedding_rank=self.embedding_rank or shape.embedding_rank,
            even=even and shape.even,
            estimated=shape.estimated or found,
        )

    @property
    def granularities(self) -> dict[str, str]:
        """What is scored, and the key that asks for it."""
        units = {"heads": self.heads, "ffn": self.ffn, "budget": self.budget}
        units |= {"attention_blocks": self.attention_blocks, "ffn_blocks": self.ffn_blocks}
        asked = {"units": next((key for key, value in units.items() if value), "")}
        asked |= {key: key for key in ("layers", "hidden", "weights") if getattr(self, key)}
        return {name: key for name, key in asked.items() if key}

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Task) -> list[Problem]:
        found = find_problems(self, shape, task)
        if found:
            return found
        for key in ("train", "recover"):
            training: Recover | None = getattr(self, key)
            if training:
                trained = shape if key == "train" and not isinstance(self.schedule, Lottery) else self.plan(shape)
                problems = training.problems_of(trained, known, task)
                found += [replace(problem, key=(key, *problem.key)) for problem in problems]
        return found

    def local_problems(self, models: LocalModels) -> list[Problem]:
        from hfcompress.distillation.teacher_checks import local_teacher_problems

        start, found = models.named.get("parent"), super().local_problems(models)
        if found or start is None:
            return found
        if self.vocabulary == "corpus":
            found += models.vocabulary_problems(start, ("vocabulary",))
        for key in ("train", "recover"):
            training: Recover | None = getattr(self, key)
            problems = local_teacher_problems(training, start, models) if training else []
            found += [replace(problem, key=(key, *problem.key)) for problem in problems]
        return found

    @property
    def tuning(self) -> str:
        """`tune`, its default resolved."""
        return self.tune or ("weights" if self._refits and "units" in self.granularities else "off")

    @property
    def _refits(self) -> bool:
        return self.criterion.refits

    def steps(self, task: Task) -> int | None:
        rows, total = task.count_rows(), 0
        rounds = {"iterative": len(getattr(self.schedule, "shares", ())), "lottery": 1}.get(self.schedule.use, 1)
        for training, times in ((self.train, self._trainings), (self.recover, rounds)):
            steps = training.steps(rows) if training else 0
            if steps is None:
                return None
            total += steps * times
        return total + (self.schedule.rewind_steps if isinstance(self.schedule, Lottery) else 0)

    @property
    def _trainings(self) -> int:
        """How often `train` is gone through."""
        return self.schedule.rounds + 1 if isinstance(self.schedule, Lottery) else 1

    def specs(self) -> dict[Key, str]:
        named: dict[Key, str] = {}
        for key in ("train", "recover"):
            training: Recover | None = getattr(self, key)
            named |= {(key, *k): name for k, name in training.teacher_specs().items()} if training else {}
        return named

    def unavailable(self) -> list[Problem]:
        blocks = {"train": self.train, "recover": self.recover}
        return [
            replace(problem, key=(key, *problem.key))
            for key, block in blocks.items()
            if block
            for problem in block.unavailable()
        ]

    def describe(self) -> Markdown:
        return describe(self)

    @classmethod
    def summarize(cls, facts: Mapping[str, Any]) -> list[Markdown]:
        return summarize(facts)

    @classmethod
    def figures(cls, facts: Mapping[str, Any]) -> list[Figure]:
        return list_figures(facts)

    def run(self, parent: Artifact, context: StageContext) -> StageResult:
        from hfcompress.pruning.engine import prune
        from hfcompress.pruning.state import start_run

        return prune(start_run(self, require_trainable(parent, self.kind), parent, context))
