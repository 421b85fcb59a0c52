"""The prune stage: its options, and the shape of the model that it plans."""

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
from hfcompress.pruning.sparsity_pattern import SparsityPattern
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown
from hfcompress.utils.figures import Figure
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.local_models import LocalModels
    from hfcompress.data.task import Task


class Sensitivity(StrictModel):
    """Measures the metric when one block alone loses its least important units, for a picture in the card."""

    shares: list[float] = Field(default=[0.25, 0.5, 0.75, 1.0], min_length=1)
    """The shares of its units that a block loses."""
    rows: int = Field(default=512, ge=1)
    """The number of rows of the dev split that are scored."""


class Prune(Stage):
    """Cuts the parts of a model that matter least by a criterion, and trains the rest."""

    participle: ClassVar[str] = "pruned"
    report_key: ClassVar[str] = "cuts"
    report_heading: ClassVar[str] = "What was cut"
    reports: ClassVar[tuple[str, ...]] = (
        "kept", "vocabulary", "embedding_rank", "sparsity", "latency", "sensitivity",
    )  # fmt: skip

    kind: Literal["prune"] = "prune"
    criterion: AnyCriterion = Field(default_factory=lambda: CRITERIA.parse("taylor"))
    """Scores how much each part matters: a name, or a mapping `{use: NAME, …}` with options."""
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of the attention heads to cut; in a decoder with grouped queries, of the key-value heads."""
    ffn: float = Field(default=0.0, ge=0, lt=1)
    """Share of the FFN neurons to cut."""
    budget: Budget | None = None
    """Limit for heads and neurons together, in place of `heads` and `ffn`."""
    attention_blocks: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """Number of whole attention blocks to cut: those with the lowest sum of head scores."""
    ffn_blocks: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """Number of whole FFN blocks to cut: those with the lowest sum of neuron scores."""
    layers: int = Field(default=0, ge=0, le=LARGEST["layers"])
    """Number of whole layers to cut."""
    hidden: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hidden dimensions to cut, in embeddings, layers and task head."""
    vocabulary: Literal["keep", "corpus"] = "keep"
    """`corpus` keeps the tokens that occur in the train and dev splits, special tokens and single characters, and makes
    a new tokenizer. The plan counts the whole vocabulary."""
    embedding_rank: int | None = Field(default=None, ge=1, le=LARGEST["width"])
    """Replace the word embeddings by a product of two matrices with this inner width, after `vocabulary`: the best one
    if tokens count by their frequency in the train split. `recover` can train what is lost."""
    weights: SparsityPattern | None = None
    """The single weights to set to zero, after the other parts are cut: `{share: 0.5}` or `{n_of_m: [2, 4]}`."""
    allocation: Literal["even", "uneven"] = "even"
    """`even` cuts the same share of every layer; `uneven` ranks the units of all layers together, with normalized
    scores."""
    multiple_of: int = Field(default=8, ge=1, le=LARGEST["width"])
    """FFN widths, and the hidden width if it is cut, stay multiples of this number: hardware is faster with them."""
    empty_blocks: bool = False
    """Allow a `budget` to cut whole attention and FFN blocks."""
    schedule: Schedule = OneShot()
    """`one_shot`, `iterative`, `gradual` or `lottery`, with options as `{use: NAME, …}`."""
    rearrange: bool = False
    """Swap cut units for others of their block if these matter less together (Kwon et al. 2022, section 3.3)."""
    tune: Literal["off", "scales", "weights"] | None = None
    """Adjust the heads and neurons that stay, by least squares and without training, so that the output of each block
    stays close to that before the cut. `scales` multiplies each unit by a number (Kwon et al. 2022, section 3.4);
    `weights` refits the matrix behind the units (Kurtic et al. 2023, eq. 3). The default is `weights` for the criterion
    `obs`, whose scores assume it, and `off` for all others."""
    train: Recover | None = None
    """Training under masks, or of each lottery ticket."""
    recover: Recover | None = None
    """Training after the cut, or after each round of `iterative`; by default there is none."""
    sensitivity: Sensitivity | None = None
    """Draw the metric when each block loses units; costs a pass over the rows for each layer, block and share."""

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
        """The granularities to score, each with the key that asks for it."""
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
        """The value of `tune`, or its default."""
        return self.tune or ("weights" if self.criterion.refits and "units" in self.granularities else "off")

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
        """The number of times that `train` runs."""
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
