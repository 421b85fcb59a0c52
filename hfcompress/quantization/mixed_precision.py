"""Mixed precision: as few layers in float32 as an accuracy budget takes, the ones that suffer most."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.context import StageContext
from hfcompress.measure.measure import Rows, judged
from hfcompress.measure.process import ModelProcess
from hfcompress.models.architectures import spec_of
from hfcompress.models.artifact import label_ids, load_model, load_tokenizer, open_artifact, read_config
from hfcompress.models.linears import linears
from hfcompress.quantization.backends.base import Work
from hfcompress.utils.logging import log

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hfcompress.quantization.stage import Quantize


@dataclass(frozen=True)
class LayerSensitivity:
    """What happens where one linear layer alone is quantized, or those together that the backend makes one.

    Attributes:
        layers: Their paths in the model.
        error: `‖z - z'‖ / ‖z‖` of the model's answers on the judged rows.
        metric: The metric on them.
    """

    layers: tuple[str, ...]
    error: float
    metric: float


@dataclass(frozen=True)
class Attempt:
    """One quantized model that was tried.

    Attributes:
        keep: Linear layers that stayed in float32.
        metric: On the dev split, from its own directory in a process of its own.
        drop: Points lost against the float model; below 0 where it gained.
        bytes: Of its weight files.
    """

    keep: tuple[str, ...]
    metric: float
    drop: float
    bytes: int


def mixed(options: Quantize, work: Work, context: StageContext) -> NDArray[Any]:
    """Writes the quantized model that keeps within the budget with the fewest layers in float32.

    The layers are ranked by what quantizing each alone does to the answers. Then models that leave 0, 1, 2, 4, … of
    them in float32 are made and judged until one holds, and what lies between the last two is halved. Where none
    holds, the model that loses least is written. What was tried is noted.

    Returns:
        The written model's logits on the probe.
    """
    search = _Search(options, work, context)
    ranked: list[LayerSensitivity] = []
    first = search.attempt(())
    if search.holds(first):
        log.info(f"quantize: all layers, {first.drop:+.2f} points lost of {options.max_drop}")
    else:
        ranked = search.sensitivity()
        fewest(len(ranked), lambda count: search.holds(search.attempt([p for x in ranked[:count] for p in x.layers])))
    chosen = search.best()
    if not search.holds(chosen):
        log.info(
            f"quantize: no attempt holds the budget of {options.max_drop} points; the best loses {chosen.drop:.2f}"
        )
    work.facts["mixed"] = {
        "metric": context.task.metric_name,
        "float": search.float_metric,
        "max_drop": options.max_drop,
        "holds": search.holds(chosen),
        "kept": list(chosen.keep),
        "tried": [{**asdict(a), "keep": len(a.keep)} for a in search.tried],
        "layers": [asdict(x) for x in ranked],
    }
    return search.write(chosen)


def fewest(most: int, holds: Callable[[int], bool]) -> None:
    """Asks `holds` of as few counts as find the least that does, supposing that more never hurts; 0 does not.

    Args:
        most: The largest count.
        holds: Whether a count of layers in float32 is enough.
    """
    low, high = 0, 1
    while high < most and not holds(high):
        low, high = high, min(2 * high, most)
    if high == most and not holds(most):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)


class _Search:
    """Models made and judged; each lies in a directory of its own until one is chosen."""

    def __init__(self, options: Quantize, work: Work, context: StageContext) -> None:
        self.options, self.work, self.context = options, work, context
        self.tokenizer = load_tokenizer(work.source, context.task)
        labels = label_ids(read_config(work.source))
        self.rows = Rows(context.task, self.tokenizer, context.rows("dev"), labels)
        self.tried: list[Attempt] = []
        self._logits: list[NDArray[Any]] = []
        self._facts: list[dict[str, Any]] = []
        self.float_metric = self._judge(work.source)

    def holds(self, attempt: Attempt) -> bool:
        """Whether it is within the budget."""
        assert self.options.max_drop is not None
        return attempt.drop <= self.options.max_drop + 1e-9

    def attempt(self, keep: Sequence[str]) -> Attempt:
        """A model with these layers in float32; none is made twice."""
        found = next((a for a in self.tried if a.keep == tuple(keep)), None)
        if found is not None:
            return found
        target = self._directory(len(self.tried))
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._facts.append({})
        work = replace(self.work, target=target, keep=frozenset(keep), facts=self._facts[-1])
        self._logits.append(self.options.backend.quantize(work))
        metric = self._judge(target)
        sign = 1 if self.context.task.greater_is_better else -1
        drop = round(100 * sign * (self.float_metric - metric), 6)
        self.tried.append(Attempt(tuple(keep), metric, drop, open_artifact(target).disk_bytes))
        log.info(
            f"quantize: {len(keep)} layers in float32, {self.context.task.metric_name} {metric:.4f}, "
            f"{drop:+.2f} points lost"
        )
        return self.tried[-1]

    def best(self) -> Attempt:
        """The smallest that is within the budget, else the one that loses least."""
        within = [a for a in self.tried if self.holds(a)]
        return min(within, key=lambda a: (a.bytes, a.drop)) if within else min(self.tried, key=lambda a: a.drop)

    def write(self, chosen: Attempt) -> NDArray[Any]:
        """Moves the chosen model to where the stage's model goes, with what was noted of it, and drops the others."""
        index = self.tried.index(chosen)
        self.work.facts.update(self._facts[index])
        for file in self._directory(index).iterdir():
            file.rename(self.work.target / file.name)
        shutil.rmtree(self._directory(index).parent)
        return self._logits[index]

    def sensitivity(self) -> list[LayerSensitivity]:
        """Each linear layer quantized alone, the one that disturbs the answers most first."""
        import numpy as np

        from hfcompress.training.evaluate import predict

        task, count = self.context.task, min(self.options.rows, len(self.rows.encoded))
        rows = self.rows.encoded.shuffle(seed=self.context.seed).select(range(count))
        model = load_model(self.work.source, task.auto_class)
        groups = together(model) if self.options.backend.fuses else [(path,) for path in linears(model)]
        log.info(f"quantize: {len(linears(model))} linear layers, {len(groups)} times some alone, on {count} dev rows")
        plain, order = predict(model, rows, self.tokenizer, task)
        found = []
        for paths in groups:
            with self.options.backend.simulated(model, paths, self.work):
                outputs, _ = predict(model, rows, self.tokenizer, task)
            error = float(np.linalg.norm(outputs - plain)) / max(float(np.linalg.norm(plain)), 1e-12)
            found.append(LayerSensitivity(paths, error, float(task.score(*task.judge(outputs, rows.select(order))))))
        return sorted(found, key=lambda x: -x.error)

    def _judge(self, path: Path) -> float:
        task = self.context.task
        with ModelProcess(open_artifact(path), task.auto_class, head=task.head) as process:
            return float(task.score(*judged(process, self.rows)))

    def _directory(self, index: int) -> Path:
        return self.context.directory / "attempts" / str(index)


def together(model: Any) -> list[tuple[str, ...]]:
    """The paths of all linear layers; those that make queries, keys and values, or an FFN and its gate, together."""
    modules = spec_of(model).modules
    parts = ({modules.query, modules.key, modules.value}, {modules.ffn_in, modules.ffn_gate} - {""})
    found: dict[str, list[str]] = {}
    for path in linears(model):
        name = path
        for number, names in enumerate(parts):
            own = next((n for n in names if path.endswith(f".{n}")), None)
            name = f"{path.removesuffix(own)}{number}" if own else name
        found.setdefault(name, []).append(path)
    return [tuple(paths) for paths in found.values()]
