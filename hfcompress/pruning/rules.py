"""The rules of a prune stage, as a table: a condition, the problem, its fix, and the key that it belongs to.

In a message, `{case.…}` is an attribute of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hfcompress.models.architectures import ARCHITECTURES
from hfcompress.models.linears import planned_linears
from hfcompress.models.shape import Shape
from hfcompress.pruning.criteria.base import CRITERIA
from hfcompress.pruning.schedules import Gradual, Iterative, Lottery, OneShot
from hfcompress.utils.errors import Problem, Rule

if TYPE_CHECKING:
    from hfcompress.data.task import Task
    from hfcompress.pruning.stage import Prune


@dataclass(frozen=True)
class Case:
    """A prune stage, the model that it gets, and its task.

    Attributes:
        stage: The stage.
        shape: The shape of the model that it gets.
        task: The task.
    """

    stage: Prune
    shape: Shape
    task: Task

    @property
    def planned(self) -> Shape:
        """The shape of the model that the stage makes."""
        return self.stage.plan(self.shape)

    @property
    def learned(self) -> bool:
        """True if the criterion learns its masks."""
        return self.stage.criterion.learned

    @property
    def masked(self) -> bool:
        """True if the model trains under masks."""
        return self.learned or isinstance(self.stage.schedule, Gradual)

    @property
    def while_training(self) -> bool:
        """True if `train` is part of the cutting."""
        return self.learned or isinstance(self.stage.schedule, (Gradual, Lottery))

    @property
    def units(self) -> bool:
        """True if heads or neurons are scored."""
        return "units" in self.stage.granularities

    @property
    def latency(self) -> bool:
        """True if the budget is a latency."""
        return bool(self.stage.budget and self.stage.budget.latency)

    @property
    def refits(self) -> bool:
        """True if remaining weights are changed to replace those that are cut."""
        stage = self.stage
        zeros = "weights" in stage.granularities and stage.criterion.refits
        return stage.rearrange or stage.tuning != "off" or zeros

    @property
    def embedding_width(self) -> int:
        """The width of the word embeddings after the stage."""
        return self.shape.embedding or self.planned.hidden

    @property
    def odd_width(self) -> int | None:
        """The first FFN width that is no multiple of `multiple_of`, else None."""
        return next((x.ffn for x in self.shape.layers if x.ffn % self.stage.multiple_of), None)

    @property
    def rank_is_idle(self) -> bool:
        """True if the product of the embedding rank has no fewer weights than the table that it replaces."""
        rank, words, width = self.stage.embedding_rank or 0, self.shape.vocab, self.embedding_width
        table = not self.shape.embedding_rank and self.shape.head not in ("mask", "causal")
        return table and rank * (words + width) >= words * width


def _cuts_all(key: str) -> Callable[[Case], bool]:
    def when(case: Case) -> bool:
        gone = 0 if key == "layers" else case.stage.layers
        return bool(getattr(case.stage, key) >= len(case.shape.layers) - gone)

    return when


def _is_set(key: str) -> Callable[[Case], bool]:
    return lambda case: getattr(case.stage, key) not in (None, False, "off", 0)


LEAVE_OUT = "leave it out"
RULES: tuple[Rule[Case], ...] = (
    Rule(
        when=lambda case: (
            not (case.stage.granularities or case.stage.vocabulary == "corpus" or case.stage.embedding_rank)
        ),
        message="nothing is pruned",
        fix="give `heads` or `ffn` a share above 0, or a `budget`",
        key=("heads",),
    ),
    # The criterion
    Rule(
        when=lambda case: case.learned and case.units and case.stage.budget is None,
        message="{case.stage.criterion.name} learns its masks under a budget, and there is none",
        fix="say `budget: {macs: 0.5}` in place of `heads` and `ffn`",
        key=("budget",),
    ),
    Rule(
        when=lambda case: case.learned and case.latency,
        message="{case.stage.criterion.name} needs costs that add up over units, and latencies do not add up",
        fix="use `macs`, `parameters` or `bytes`",
        key=("budget", "latency"),
    ),
    # Sizes
    *(
        Rule(
            when=_cuts_all(key),
            message=f"{{case.stage.{key}}} of {{depth}} layers would leave none",
            fix="leave at least one",
            key=(key,),
        )
        for key in ("layers", "attention_blocks", "ffn_blocks")
    ),
    Rule(
        when=lambda case: (case.stage.ffn or case.stage.budget) and case.odd_width,
        message="the FFN width {case.odd_width} is not a multiple of {case.stage.multiple_of}",
        fix="say `multiple_of: 1`",
        key=("multiple_of",),
    ),
    Rule(
        when=lambda case: case.stage.hidden and case.shape.hidden % case.stage.multiple_of,
        message="the hidden width {case.shape.hidden} is not a multiple of {case.stage.multiple_of}",
        fix="say `multiple_of: 1`",
        key=("multiple_of",),
    ),
    *(
        Rule(
            when=lambda case, key=key: case.latency and getattr(case.stage, key),  # type: ignore[misc]
            message=f"a latency needs timings of the model's heads and neurons, and `{key}` changes these",
            fix="cut it in an earlier stage",
            key=(key,),
        )
        for key in ("layers", "hidden")
    ),
    Rule(
        when=lambda case: case.stage.hidden and case.shape.embedding == case.planned.hidden,
        message="the new hidden width is that of the embeddings ({case.shape.embedding}), which no config can express",
        fix="cut a little more or less",
        key=("hidden",),
    ),
    Rule(
        when=lambda case: case.stage.embedding_rank and case.shape.embedding_rank,
        message="the word embeddings are already a product of rank {case.shape.embedding_rank}",
        fix=LEAVE_OUT,
        key=("embedding_rank",),
    ),
    Rule(
        when=lambda case: (
            case.stage.embedding_rank and not case.shape.embedding_rank and case.shape.head in ("mask", "causal")
        ),
        message="the task head predicts words with the table of the word embeddings, and a product has no such table",
        fix=LEAVE_OUT,
        key=("embedding_rank",),
    ),
    Rule(
        when=lambda case: case.rank_is_idle,
        message="a product of rank {case.stage.embedding_rank} has no fewer weights than a table of width "
        "{case.embedding_width}",
        fix="give a smaller rank",
        key=("embedding_rank",),
    ),
    Rule(
        when=lambda case: case.stage.layers and case.shape.spec.shared_layers,
        message="all layers share the same weights, so no layer matters less than another",
        fix="use `ffn`",
        key=("layers",),
    ),
    # Options that would change nothing, or that another one rules out
    *(
        Rule(
            when=lambda case, key=key: case.stage.budget and getattr(case.stage, key),  # type: ignore[misc]
            message=f"`budget` and `{key}` decide the same thing",
            fix="leave one of them out",
            key=(key,),
        )
        for key in ("heads", "ffn", "attention_blocks", "ffn_blocks")
    ),
    Rule(
        when=lambda case: case.stage.budget and case.stage.says("allocation"),
        message="a budget decides how much each layer loses, so `allocation` changes nothing",
        fix=LEAVE_OUT,
        key=("allocation",),
    ),
    Rule(
        when=lambda case: (
            not case.stage.budget and case.stage.says("allocation") and not (case.stage.heads or case.stage.ffn)
        ),
        message="no share of heads or neurons is cut, so `allocation` changes nothing",
        fix=LEAVE_OUT,
        key=("allocation",),
    ),
    Rule(
        when=lambda case: case.stage.empty_blocks and not case.stage.budget,
        message="`empty_blocks` is only for a `budget`",
        fix="use `attention_blocks` or `ffn_blocks`",
        key=("empty_blocks",),
    ),
    *(
        Rule(
            when=lambda case, key=key: _is_set(key)(case) and not case.units,  # type: ignore[misc]
            message=f"`{key}` is only for heads and neurons, and none are cut",
            fix=LEAVE_OUT,
            key=(key,),
        )
        for key in ("rearrange", "tune", "sensitivity")
    ),
    # The schedule
    Rule(
        when=lambda case: case.learned and not isinstance(case.stage.schedule, OneShot),
        message="{case.stage.criterion.name} has a schedule of its own",
        fix="leave `schedule` out",
        key=("schedule",),
    ),
    Rule(
        when=lambda case: case.while_training and case.stage.train is None,
        message="{cutter} cuts while the model trains, and there is no `train`",
        fix="add `train: {epochs: 3}`",
        key=("train",),
    ),
    Rule(
        when=lambda case: case.stage.train is not None and not case.while_training,
        message="`train` is only for learned masks, `gradual` and `lottery`",
        fix="use `recover` to train after the cut",
        key=("train",),
    ),
    Rule(
        when=lambda case: isinstance(case.stage.schedule, Iterative) and case.stage.recover is None,
        message="iterative pruning trains after each cut, and there is no `recover`",
        fix="add `recover: {epochs: 1}`",
        key=("recover",),
    ),
    Rule(
        when=lambda case: isinstance(case.stage.schedule, Lottery) and case.stage.recover is not None,
        message="a lottery ticket is trained by `train`, and `recover` would be ignored",
        fix="leave `recover` out",
        key=("recover",),
    ),
    Rule(
        when=lambda case: case.masked and {"units", "weights"} <= case.stage.granularities.keys(),
        message="masks during training are on heads and neurons or on single weights, not on both",
        fix="cut one of them in a separate stage",
        key=("weights",),
    ),
    Rule(
        when=lambda case: case.masked and case.stage.train and case.stage.train.lora,
        message="masks are trained together with all weights, so `lora` cannot be used here",
        fix="use it in `recover`",
        key=("train", "lora"),
    ),
    Rule(
        when=lambda case: case.masked and case.stage.sensitivity,
        message="nothing is scored before the training, so `sensitivity` cannot be drawn",
        fix=LEAVE_OUT,
        key=("sensitivity",),
    ),
    *(
        Rule(
            when=lambda case, key=key: case.masked and getattr(case.stage, key),  # type: ignore[misc]
            message=f"`{key}` cannot be cut while the model trains",
            fix="cut it in a separate stage",
            key=(key,),
        )
        for key in ("layers", "hidden", "attention_blocks", "ffn_blocks")
    ),
    # Data
    *(
        Rule(
            when=lambda case, key=key: case.task.is_streamed and getattr(case.stage, key) not in ("keep", None),  # type: ignore[misc]
            message="a streamed corpus is not read as a whole, so its tokens cannot be counted",
            fix=f"leave `{key}` out, or `streaming`",
            key=(key,),
        )
        for key in ("vocabulary", "embedding_rank")
    ),
)


def find_problems(stage: Prune, shape: Shape, task: Task) -> list[Problem]:
    """Finds the problems of a stage with a model of this shape, with key paths inside the stage."""
    case = Case(stage, shape, task)
    words = {
        "case": case,
        "depth": len(shape.layers),
        "cutter": stage.criterion.name if case.learned else stage.schedule.use,
    }
    found = [Problem(rule.message.format(**words), rule.fix, rule.key) for rule in RULES if rule.when(case)]
    found += [*_find_unscored(stage), *_find_late_refits(case)]
    if case.masked and stage.train:
        found += [replace(problem, key=("train", *problem.key)) for problem in stage.train.masked_problems()]
    return found or list(_find_tiling_problem(stage, case.planned))


_NAMES: Mapping[str, str] = {
    "units": "heads and neurons", "layers": "whole layers", "hidden": "hidden dimensions", "weights": "weights",
}  # fmt: skip


def _find_unscored(stage: Prune) -> Iterator[Problem]:
    """Yields a problem for each granularity that the criterion does not score, with the criteria that do."""
    for granularity, key in stage.granularities.items():
        if granularity not in stage.criterion.scored:
            able = [name for name in CRITERIA.names() if granularity in CRITERIA.get(name).scored]
            message = f"the criterion {stage.criterion.name} does not score {_NAMES[granularity]}"
            yield Problem(message, f"use one of {', '.join(able)}, or leave `{key}` out", ("criterion",))


def _find_late_refits(case: Case) -> Iterator[Problem]:
    """Yields a problem if an option refits weights, and the schedule then continues with other weights."""
    stage = case.stage
    if case.refits and (case.learned or not isinstance(stage.schedule, (OneShot, Iterative))):
        key = "rearrange" if stage.rearrange else "tune" if stage.tune else "criterion"
        message = f"`{key}` refits weights after the cut, which only the schedules one_shot and iterative can use"
        yield Problem(message, "leave it out, or say `tune: off`", (key,))


def _find_tiling_problem(stage: Prune, planned: Shape) -> Iterator[Problem]:
    """Yields a problem for the first matrix that the pattern does not divide, if sizes are known before the cut."""
    if stage.weights is None or not planned.even:
        return
    for number, layer in enumerate(planned.layers):
        for path, inputs, outputs in planned_linears(planned, layer):
            name = f"{ARCHITECTURES[planned.architecture].modules.layers}.{number}.{path}.weight"
            if problem := stage.weights.find_problem(name, outputs, inputs):
                yield replace(problem, key=("weights",))
                return
