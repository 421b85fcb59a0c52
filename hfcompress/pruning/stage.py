"""What matters least is cut out, at any granularity and on any schedule, and the rest recovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from hfcompress.context import Stage, StageContext, StageResult, require_trainable
from hfcompress.distillation.recovery import Recover
from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.artifact import Artifact
from hfcompress.models.bounds import LARGEST
from hfcompress.models.linears import planned_linears
from hfcompress.models.shape import Layer, Shape
from hfcompress.pruning.allocation import count_by_layer, count_kept
from hfcompress.pruning.budget import Budget
from hfcompress.pruning.criteria.base import CRITERIA, AnyCriterion
from hfcompress.pruning.description import describe, summarize
from hfcompress.pruning.figures import list_figures
from hfcompress.pruning.pattern import Pattern
from hfcompress.pruning.schedules import Gradual, Iterative, Lottery, OneShot, Schedule
from hfcompress.utils.errors import Key, Problem
from hfcompress.utils.escape import Markdown
from hfcompress.utils.figures import Figure
from hfcompress.utils.strict_model import StrictModel

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.local_models import LocalModels


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
        found = [*self._nothing(), *self._criterion_problems(), *self._size_problems(shape), *self._idle_problems()]
        found += self._schedule_problems()
        for key, asked in (("vocabulary", self.vocabulary == "corpus"), ("embedding_rank", self.embedding_rank)):
            if task.streamed and asked:
                message = "a corpus that is streamed is not read through for the tokens that it uses"
                found.append(Problem(message, f"leave `{key}` out, or `streaming`", (key,)))
        if not found:
            found += self._tile_problems(self.plan(shape))
        if found:
            return found
        for key in ("train", "recover"):
            training: Recover | None = getattr(self, key)
            if training:
                trained = shape if key == "train" and not isinstance(self.schedule, Lottery) else self.plan(shape)
                problems = training.problems_of(trained, known, task)
                found += [replace(problem, key=(key, *problem.key)) for problem in problems]
        return found

    def _nothing(self) -> list[Problem]:
        if self.granularities or self.vocabulary == "corpus" or self.embedding_rank:
            return []
        return [Problem("nothing is pruned", "give `heads` or `ffn` a share above 0, or a `budget`", ("heads",))]

    def _criterion_problems(self) -> list[Problem]:
        name, found = self.criterion.name, []
        for granularity, key in self.granularities.items():
            if granularity not in self.criterion.scored:
                able = [n for n in CRITERIA.names() if granularity in CRITERIA.get(n).scored]
                message = f"the criterion {name} does not score {_WHAT[granularity]}"
                found.append(Problem(message, f"use one of {', '.join(able)}, or leave `{key}` out", ("criterion",)))
        if self.criterion.learned and "units" in self.granularities and self.budget is None:
            message = f"{name} learns its masks under a budget"
            found.append(Problem(message, "say `budget: {macs: 0.5}` in place of heads and ffn", ("budget",)))
        if self.criterion.learned and self.budget and self.budget.latency:
            message = f"{name} needs a cost that adds up over units, and latencies do not"
            found.append(Problem(message, "say macs, parameters or bytes", ("budget", "latency")))
        return found

    def _size_problems(self, shape: Shape) -> list[Problem]:
        found, count = [], len(shape.layers)
        for key in ("layers", "attention_blocks", "ffn_blocks"):
            if getattr(self, key) >= count - (0 if key == "layers" else self.layers):
                message = f"{getattr(self, key)} of {count} layers would leave none"
                found.append(Problem(message, "leave at least one", (key,)))
        odd = next((layer.ffn for layer in shape.layers if layer.ffn % self.multiple_of), None)
        if (self.ffn or self.budget) and odd:
            message = f"the FFN width {odd} is not a multiple of {self.multiple_of}"
            found.append(Problem(message, "say `multiple_of: 1`", ("multiple_of",)))
        if self.hidden and shape.hidden % self.multiple_of:
            message = f"the hidden width {shape.hidden} is not a multiple of {self.multiple_of}"
            found.append(Problem(message, "say `multiple_of: 1`", ("multiple_of",)))
        apart = next((key for key in ("layers", "hidden") if getattr(self, key)), None)
        if self.budget and self.budget.latency and apart:
            message = (
                f"the timings of a latency are of heads and neurons of the whole model, and `{apart}` changes them"
            )
            found.append(Problem(message, "cut it in a stage before", (apart,)))
        if self.hidden and shape.embedding == self.plan(shape).hidden:
            message = f"the hidden width would be that of the embeddings ({shape.embedding}), which no config can say"
            found.append(Problem(message, "cut a little more or less", ("hidden",)))
        width = shape.embedding or self.plan(shape).hidden
        if self.embedding_rank and shape.embedding_rank:
            message = f"the word embeddings are a product of rank {shape.embedding_rank} already"
            found.append(Problem(message, "leave it out", ("embedding_rank",)))
        elif self.embedding_rank and shape.head in ("mask", "causal"):
            message = "the head makes its words with the embeddings' table, which a product has not"
            found.append(Problem(message, "leave it out", ("embedding_rank",)))
        elif self.embedding_rank and self.embedding_rank * (shape.vocab + width) >= shape.vocab * width:
            message = f"a product of rank {self.embedding_rank} has no fewer weights than a table of width {width}"
            found.append(Problem(message, "give a smaller rank", ("embedding_rank",)))
        if self.layers and shape.spec.shared_layers:
            return [*found, Problem("all layers have the same weights: none matters less", "use `ffn`", ("layers",))]
        return found

    def _idle_problems(self) -> list[Problem]:
        """Options that would change nothing, or that another one rules out."""
        units, found = "units" in self.granularities, []
        if self.budget:
            for key in ("heads", "ffn", "attention_blocks", "ffn_blocks"):
                if getattr(self, key):
                    found.append(Problem(f"`budget` decides what `{key}` decides", "leave one of them out", (key,)))
            if self.says("allocation"):
                message = "a budget is spent where it is worth most, so `allocation` changes nothing"
                found.append(Problem(message, "leave it out", ("allocation",)))
        elif self.says("allocation") and not (self.heads or self.ffn):
            message = "no share of heads or neurons is cut, so `allocation` changes nothing"
            found.append(Problem(message, "leave it out", ("allocation",)))
        if self.empty_blocks and not self.budget:
            message = "`empty_blocks` is for a `budget`"
            found.append(Problem(message, "use attention_blocks or ffn_blocks", ("empty_blocks",)))
        for key in ("rearrange", "tune", "sensitivity"):
            if getattr(self, key) not in (None, False, "off") and not units:
                found.append(Problem(f"`{key}` is for heads and neurons, and none are cut", "leave it out", (key,)))
        return found

    def _schedule_problems(self) -> list[Problem]:
        found, key = [], ("schedule",)
        name, learned = self.schedule.use, self.criterion.learned
        if learned and not isinstance(self.schedule, OneShot):
            found.append(Problem(f"{self.criterion.name} has a schedule of its own", "leave `schedule` out", key))
        if (learned or isinstance(self.schedule, (Gradual, Lottery))) and self.train is None:
            what = self.criterion.name if learned else name
            message = f"{what} cuts while the model trains, and there is no `train`"
            found.append(Problem(message, "add `train: {epochs: 3}`", ("train",)))
        if self.train is not None and not learned and not isinstance(self.schedule, (Gradual, Lottery)):
            message = "`train` is for learned masks, `gradual` and `lottery`"
            found.append(Problem(message, "use `recover` to train after the cut", ("train",)))
        if isinstance(self.schedule, Iterative) and self.recover is None:
            message = "iterative pruning trains after each cut, and there is no `recover`"
            found.append(Problem(message, "add `recover: {epochs: 1}`", ("recover",)))
        if isinstance(self.schedule, Lottery) and self.recover is not None:
            message = "a lottery ticket is trained by `train`, which would undo what `recover` says"
            found.append(Problem(message, "leave `recover` out", ("recover",)))
        masked = learned or isinstance(self.schedule, Gradual)
        if masked and {"units", "weights"} <= self.granularities.keys():
            message = "masks that train with the model lie on heads and neurons or on single weights, not on both"
            found.append(Problem(message, "cut one of them in a stage of its own", ("weights",)))
        if masked and self.train:
            found += [replace(problem, key=("train", *problem.key)) for problem in self.train.masked_problems()]
        if masked and self.train and self.train.lora:
            found.append(Problem("masks are learned with all weights", "use it in `recover`", ("train", "lora")))
        if masked and self.sensitivity:
            message = "nothing is scored before the training, so `sensitivity` has nothing to draw"
            found.append(Problem(message, "leave it out", ("sensitivity",)))
        mixed = [k for k in ("layers", "hidden", "attention_blocks", "ffn_blocks") if getattr(self, k)]
        if masked and mixed:
            fix = "cut them in a stage of their own"
            found.append(Problem(f"`{mixed[0]}` cannot be cut while the model trains", fix, (mixed[0],)))
        fixed = learned or not isinstance(self.schedule, (OneShot, Iterative))
        if fixed and (self.rearrange or self.tuning != "off" or ("weights" in self.granularities and self._refits)):
            what = "rearrange" if self.rearrange else "tune" if self.tune else "criterion"
            message = "weights that take over from others are for one_shot and iterative"
            found.append(Problem(message, "leave it out, or say `tune: off`", (what,)))
        return found

    def _tile_problems(self, shape: Shape) -> list[Problem]:
        """That a pattern does not tile the matrices that are left, where their sizes are known before the cut."""
        if self.weights is None or not shape.even:
            return []
        for number, layer in enumerate(shape.layers):
            for path, inputs, outputs in planned_linears(shape, layer):
                name = f"{ARCHITECTURES[shape.architecture].modules.layers}.{number}.{path}.weight"
                if problem := self.weights.untiled(name, outputs, inputs):
                    return [replace(problem, key=("weights",))]
        return []

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
        rows, total = task.rows(), 0
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


_WHAT = {"units": "heads and neurons", "layers": "whole layers", "hidden": "hidden dimensions", "weights": "weights"}
