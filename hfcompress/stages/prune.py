"""Heads and FFN neurons that matter least are cut out, and the rest recovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hfcompress.base.console import say
from hfcompress.base.errors import Key, Problem
from hfcompress.base.shape import ARCHITECTURES, Layer, Shape
from hfcompress.criteria.base import CRITERIA, AnyCriterion, Calibration
from hfcompress.losses.soft_labels import SoftLabels
from hfcompress.model.artifact import Artifact, load_model, load_tokenizer, save_model
from hfcompress.stages.base import Bench, Stage, on_main_process, process_state, require_trainable
from hfcompress.stages.taught import Losses, Taught
from hfcompress.stages.teach import teach
from hfcompress.stages.teachers import AnyTeachers, Teachers
from hfcompress.stages.train import Train

if TYPE_CHECKING:
    from torch import Tensor


class Recover(Train, Taught):
    """Training after the cut: a `train:` block with losses and a teacher."""

    epochs: float = Field(default=1.0, ge=0)
    losses: Losses = [SoftLabels()]
    teacher: AnyTeachers = Teachers(models=["parent"])
    """Who teaches: `parent` (the unpruned model), `source`, an earlier stage, a directory or a Hub id; or several."""


class Prune(Stage):
    """Cuts a share of the heads and of the FFN neurons."""

    kind: Literal["prune"]
    criterion: AnyCriterion = Field(default_factory=lambda: CRITERIA.parse("taylor"))
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of the attention heads to cut."""
    ffn: float = Field(default=0.0, ge=0, lt=1)
    """Share of the FFN neurons to cut."""
    allocation: Literal["even", "uneven"] = "even"
    """`even` cuts the same number in every layer; `uneven` ranks all layers together, scores normalised by layer."""
    multiple_of: int = Field(default=8, ge=1)
    """FFN widths stay multiples of it, where hardware likes them."""
    recover: Recover | None = None
    """Training after the cut; none where it is left out."""

    def plan(self, shape: Shape) -> Shape:
        even = self.allocation == "even"
        heads = quota([layer.heads for layer in shape.layers], self.heads, 1, even)
        ffn = quota([layer.ffn for layer in shape.layers], self.ffn, self.multiple_of, even)
        return replace(shape, layers=tuple(Layer(h, f) for h, f in zip(heads, ffn, strict=True)), even=even)

    def problems(self, shape: Shape, known: Mapping[str, Shape], task: Any) -> list[Problem]:
        if not shape.keys.prunable:
            able = ", ".join(name for name, keys in ARCHITECTURES.items() if keys.prunable)
            message = f"heads and neurons of {shape.architecture} cannot be cut, those of {able} can"
            return [Problem(message, "a `distill` stage with a `student` makes any model smaller", ("kind",))]
        found = []
        if self.heads == 0 and self.ffn == 0:
            found.append(Problem("nothing is pruned", "give `heads` or `ffn` a share above 0", ("heads",)))
        odd = next((layer.ffn for layer in shape.layers if layer.ffn % self.multiple_of), None)
        if self.ffn and odd:
            message = f"the FFN width {odd} is not a multiple of {self.multiple_of}"
            found.append(Problem(message, "say `multiple_of: 1`", ("multiple_of",)))
        if self.recover:
            problems = self.recover.taught_problems(self.plan(shape), known, task)
            problems += [replace(p, key=p.key[1:]) for p in self.recover.problems(task)]
            found += [replace(problem, key=("recover", *problem.key)) for problem in problems]
        return found

    def steps(self, task: Any) -> int | None:
        return self.recover.steps(task.rows()) if self.recover else 0

    def specs(self) -> dict[Key, str]:
        named = self.recover.teacher_specs() if self.recover else {}
        return {("recover", *key): name for key, name in named.items()}

    def run(self, parent: Artifact, bench: Bench) -> None:
        require_trainable(parent, self.kind)
        tokenizer = load_tokenizer(parent.path)
        cut_directory = bench.directory / "cut"
        on_main_process(lambda: self._cut(parent, bench, tokenizer, cut_directory))
        pruned = load_model(cut_directory, bench.task.auto_class)
        if self.recover:
            teach(pruned, self.recover, self.recover, parent, bench, tokenizer)
        bench.finish(pruned, tokenizer)

    def _cut(self, parent: Artifact, bench: Bench, tokenizer: Any, target: Any) -> None:
        """Scores, chooses and cuts; one process does it, so that all of them go on with the same mask."""
        from hfcompress.model.surgery import Keep, cut

        if (target / "config.json").is_file():
            return
        model = load_model(parent.path, bench.task.auto_class).to(process_state().device)
        say(f"prune: scoring by {self.criterion.name}")
        scores = self.criterion.scores(model, self._calibration(bench, tokenizer, model))
        shape = require_trainable(parent, self.kind)
        heads = choose(scores.heads, self.heads, 1, self.allocation == "even")
        neurons = choose(scores.neurons, self.ffn, self.multiple_of if self.ffn else 1, self.allocation == "even")
        small = cut(model, [Keep(h, n) for h, n in zip(heads, neurons, strict=True)]).cpu()
        bench.notes["kept"] = [
            {"heads": f"{len(h)}/{layer.heads}", "ffn": f"{len(n)}/{layer.ffn}"}
            for h, n, layer in zip(heads, neurons, shape.layers, strict=True)
        ]
        scratch = target.with_name(target.name + ".partial")
        save_model(small, tokenizer, scratch)
        scratch.rename(target)

    def _calibration(self, bench: Bench, tokenizer: Any, model: Any) -> Calibration:
        from hfcompress.stages import training

        def batches(count: int) -> Any:
            rows = bench.sample(count, tokenizer, dict(model.config.label2id))
            return list(training.batches(rows, tokenizer, bench.task))

        return Calibration(batches, bench.task.loss, bench.seed)


def kept(units: int, share_cut: float, multiple: int = 1) -> int:
    """How many of a layer's units stay: the nearest multiple, at least one where there are any."""
    if share_cut == 0 or units == 0:
        return units
    groups = units / multiple
    return max(round(groups * (1 - share_cut)), 1) * multiple


def quota(units: list[int], share_cut: float, multiple: int, even: bool) -> list[int]:
    """How many units stay in each layer; where a global ranking decides, the total is exact and its spread is not."""
    if even or share_cut == 0:
        return [kept(n, share_cut, multiple) for n in units]
    groups = max(kept(sum(units), share_cut, multiple) // multiple, len(units))
    each, more = divmod(groups, len(units))
    return [(each + (i < more)) * multiple for i in range(len(units))]


def choose(scores: list[Tensor], share_cut: float, multiple: int, even: bool) -> list[tuple[int, ...]]:
    """The units that stay in each layer, ascending.

    Within a layer the best stay, in groups of `multiple`. `even` keeps the same share of each layer; otherwise groups
    of all layers are ranked together by the sum of their scores, each layer's scores divided by their norm
    (Michel et al. 2019), at least one group a layer staying.
    """
    counts = quota([len(s) for s in scores], share_cut, multiple, even)
    if not even and share_cut:
        counts = _ranked(scores, sum(counts), multiple)
    order = [s.float().argsort(descending=True, stable=True) for s in scores]
    return [tuple(sorted(o[:n].tolist())) for o, n in zip(order, counts, strict=True)]


def _ranked(scores: list[Tensor], total: int, multiple: int) -> list[int]:
    candidates = []
    for layer, values in enumerate(scores):
        normalised = (values.float() / values.float().norm().clamp(min=1e-20)).sort(descending=True).values
        groups = normalised.reshape(-1, multiple).sum(-1)
        candidates += [(float(value), layer, rank) for rank, value in enumerate(groups)]
    first = [c for c in candidates if c[2] == 0]
    rest = sorted((c for c in candidates if c[2] > 0), key=lambda c: (-c[0], c[1], c[2]))
    counts = [0] * len(scores)
    for _, layer, _ in (first + rest)[: total // multiple]:
        counts[layer] += multiple
    return counts
